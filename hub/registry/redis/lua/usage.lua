-- Counts of the answers of tasks. The hash `usage` of a dataset has a record (JSON text) for each day, numbered from
-- 1970, and the bytes of all records in `b`.
--
-- A record has v (counts of each version: n images, l label -> images, h images by tenth of typicality, m images with a
-- typicality, t its sum, u unknown images), and k, c and r: kept images, confirmed answers, corrected answers. The
-- labels and versions beyond a limit share the name `other`.

local usage = {}

local OTHER = 'other'

local function size_of(map)
  local count = 0
  for _ in pairs(map) do count = count + 1 end
  return count
end

local function add_version(former, added, max_labels)
  former.n, former.m = former.n + added.n, former.m + added.m
  former.t, former.u = former.t + added.t, former.u + added.u
  for i, images in ipairs(added.h) do former.h[i] = former.h[i] + images end
  local labels = size_of(former.l)
  for label, images in pairs(added.l) do
    local name = label
    if not former.l[label] and labels >= max_labels then name = OTHER end
    if not former.l[name] then labels = labels + 1 end
    former.l[name] = (former.l[name] or 0) + images
  end
end

local function new_version(tenths)
  local found = {n = 0, l = {}, h = {}, m = 0, t = 0, u = 0}
  for i = 1, tenths do found.h[i] = 0 end
  return found
end

-- Replace the record of a day, or remove it (text nil), and keep account of the bytes.
local function write_day(tenant, key, day, text)
  local change = -redis.call('HSTRLEN', key, day)
  if text then
    redis.call('HSET', key, day, text)
    change = change + #text
  else
    redis.call('HDEL', key, day)
  end
  redis.call('INCRBY', tenant_key(tenant, 'usage_bytes'), change)
  return redis.call('HINCRBY', key, 'b', change)
end

-- Remove expired days, and the oldest ones while the task or the tenant has too many bytes.
local function prune(args, tenant, key, oldest, bytes)
  local days = {}
  for _, name in ipairs(redis.call('HKEYS', key)) do
    if name ~= 'b' then days[#days + 1] = tonumber(name) end
  end
  table.sort(days)
  for _, day in ipairs(days) do
    local total = tonumber(redis.call('GET', tenant_key(tenant, 'usage_bytes')) or 0)
    if day >= oldest and bytes <= args.max_task_bytes and total <= args.max_tenant_bytes then return end
    bytes = write_day(tenant, key, string.format('%.0f', day))
  end
end

local function add_day(args, added, today)
  local oldest = today - args.retention_days + 1
  if redis.call('EXISTS', task_key(added.tenant, added.task)) == 0 then return end
  if added.day < oldest or added.day > today + 1 then return end
  local key, day = dataset_key(added.tenant, added.task, 'usage'), string.format('%.0f', added.day)
  local text = redis.call('HGET', key, day)
  local record = text and cjson.decode(text) or {v = {}, k = 0, c = 0, r = 0}
  record.k, record.c, record.r = record.k + added.k, record.c + added.c, record.r + added.r
  for number, counts in pairs(added.v) do
    local name = number
    if not record.v[number] and size_of(record.v) >= args.max_versions then name = OTHER end
    record.v[name] = record.v[name] or new_version(#counts.h)
    add_version(record.v[name], counts, args.max_labels)
  end
  local bytes = write_day(added.tenant, key, day, cjson.encode(record))
  local total = tonumber(redis.call('GET', tenant_key(added.tenant, 'usage_bytes')))
  if not text or bytes > args.max_task_bytes or total > args.max_tenant_bytes then
    prune(args, added.tenant, key, oldest, bytes)
  end
end

-- gateway, number, days: counts of a gateway, each with tenant, task, day, and the members of a record to add;
-- retention_days, max_labels, max_versions, max_task_bytes, max_tenant_bytes. A gateway numbers its calls, so that a
-- call whose reply was lost counts once.
function usage.add(args)
  local last = 'karst:usage-calls:' .. args.gateway
  if tonumber(redis.call('GET', last) or 0) >= args.number then return DONE end
  redis.call('SET', last, string.format('%.0f', args.number), 'EX', 86400)
  local today = math.floor(now_s() / 86400)
  for _, added in ipairs(args.days) do add_day(args, added, today) end
  return DONE
end

return cjson.encode(usage[ARGV[1]](cjson.decode(ARGV[2])))
