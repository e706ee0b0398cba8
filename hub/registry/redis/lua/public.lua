-- The tasks that every tenant may use: a sorted set whose members have equal scores, so it is read in order of names.

local PUBLIC = 'karst:published'
local FORMER_PUBLIC = 'karst:public' -- a set, which older hubs have written

local function adopt_former_public()
  if redis.call('EXISTS', FORMER_PUBLIC) == 0 then return end
  for _, name in ipairs(redis.call('SMEMBERS', FORMER_PUBLIC)) do redis.call('ZADD', PUBLIC, 0, name) end
  redis.call('DEL', FORMER_PUBLIC)
end
