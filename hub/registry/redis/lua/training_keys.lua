-- Helpers for trainings: the record of each, and the queue of those that a process of its own runs.
--
-- A job is named `tenant:task:id`. `karst:training-jobs` has the token of the gateway that runs it, '' while it is
-- queued. A job that no gateway's lease covers any more is free for any other gateway.

local JOBS, LEASES, TURNS = 'karst:training-jobs', 'karst:training-leases', 'karst:training-turns'
local MADE = 'karst:training-versions' -- job -> version that it has registered
local TURN_S = 86400 -- for so long the registry remembers whose turn was last

local function job_name(tenant, task, id)
  return tenant .. ':' .. task .. ':' .. id
end

-- Remove a training from the queue. Return whether it was queued or running.
local function drop_job(tenant, task, id)
  local job, queue = job_name(tenant, task, id), tenant_key(tenant, 'training-queue')
  if redis.call('HDEL', JOBS, job) == 0 then return false end
  redis.call('ZREM', LEASES, job)
  redis.call('HDEL', MADE, job)
  redis.call('SREM', tenant_key(tenant, 'training-jobs'), job)
  redis.call('ZREM', queue, job)
  if redis.call('EXISTS', queue) == 0 then redis.call('ZREM', TURNS, tenant) end
  return true
end
