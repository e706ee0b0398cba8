-- Helpers of every script that changes the registry: revocation check, change events, audit entries.

local MAX_EVENTS = 100000 -- kept change events per stream
local MAX_ADMIN_ENTRIES = 100000 -- kept audit entries of admins

local DONE = {outcome = 'done'}
local REVOKED = {outcome = 'revoked'}
local ABSENT = {outcome = 'absent'}

local function limit_reached(limit, maximum)
  -- As text: cjson would write 10^14 bytes as 1e+14.
  return {outcome = 'limit', limit = limit, maximum = string.format('%.0f', maximum)}
end

local function tenant_key(tenant, name)
  return 'karst:t:' .. tenant .. ':' .. name
end

-- Return whether the caller's key was revoked while its request was in flight.
local function is_revoked(entry)
  local key = cjson.decode(entry).key
  return key ~= '' and redis.call('HEXISTS', 'karst:keys', key) == 0
end

-- Return the time by Redis' clock, in seconds since 1970.
local function now_s()
  local clock = redis.call('TIME')
  return tonumber(clock[1]) + tonumber(clock[2]) / 1000000
end

-- Take one of the tenant's changes of this minute. Admins take none. Return a refusal, or nil.
local function take_change(args)
  if args.tenant == '' or cjson.decode(args.entry).role == 'admin' then return nil end
  local key, maximum, now = tenant_key(args.tenant, 'changes'), args.max_changes, now_s()
  local stored = redis.call('HMGET', key, 'left', 'at')
  local elapsed = math.max(0, now - tonumber(stored[2] or 0))
  local left = math.min(maximum, tonumber(stored[1] or maximum) + elapsed * maximum / 60)
  if left < 1 then return limit_reached('changes_per_minute', maximum) end
  redis.call('HSET', key, 'left', tostring(left - 1), 'at', string.format('%.6f', now))
  redis.call('EXPIRE', key, 600)
  return nil
end

-- Take further changes of the tenant, even more than it has left.
local function take_further_changes(args, count)
  local key = tenant_key(args.tenant, 'changes')
  if count > 0 and redis.call('EXISTS', key) == 1 then redis.call('HINCRBYFLOAT', key, 'left', -count) end
end

-- Return why the caller may not change anything now, or nil.
local function refusal_of(args)
  if is_revoked(args.entry) then return REVOKED end
  return take_change(args)
end

-- Mark a task of a tenant that sorts its tasks: the next sorted list sorts it again.
local function mark_unsorted(tenant, task)
  if redis.call('EXISTS', tenant_key(tenant, 'by:name')) == 1 then
    redis.call('SADD', tenant_key(tenant, 'unsorted'), task)
  end
end

-- Keys and tenants have a stream of their own as well: a gateway that is slow loses no revocation beside many changes of
-- tasks. An older hub reads the common stream only.
local function publish(tenant, kind, name)
  local streams = {'karst:events'}
  if kind ~= 'task' and kind ~= 'dataset' then streams[2] = 'karst:events:access' end
  if kind == 'task' then mark_unsorted(tenant, name) end
  for _, stream in ipairs(streams) do
    redis.call('XADD', stream, 'MAXLEN', '~', MAX_EVENTS, '*', 'tenant', tenant, 'kind', kind, 'name', name)
  end
end

-- Delete the oldest entries of a tenant beyond its share, from its own audit and from the hub's. Admins' entries stay in
-- the hub's.
local function trim_audit(stream, max_entries)
  local excess = redis.call('XLEN', stream) - max_entries
  if excess <= 0 then return end
  for _, old in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', math.min(excess, 100))) do
    redis.call('XDEL', stream, old[1])
    if #redis.call('XRANGE', 'karst:audit:admins', old[1], old[1]) == 0 then redis.call('XDEL', 'karst:audit', old[1]) end
  end
end

-- Append an entry (JSON text) to the audit of the hub, of admins and of the tenant ('': the hub itself), with one id.
-- audit_s: seconds that the hub and the tenant keep an entry; null: as the last caller with a number said.
-- max_audit: entries that one tenant has in both.
local function append_audit(args)
  local tenant, entry = args.tenant, args.entry
  local id = redis.call('XADD', 'karst:audit', '*', 'tenant', tenant, 'entry', entry)
  local streams = {'karst:audit'}
  if cjson.decode(entry).role == 'admin' then
    redis.call('XADD', 'karst:audit:admins', 'MAXLEN', '~', MAX_ADMIN_ENTRIES, id, 'tenant', tenant, 'entry', entry)
    streams[2] = 'karst:audit:admins'
  end
  if tenant ~= '' then
    local own = tenant_key(tenant, 'audit')
    local added = redis.pcall('XADD', own, id, 'tenant', tenant, 'entry', entry)
    -- After a loss of the hub's stream the tenant's own may be ahead of its ids.
    if added.err then redis.call('XADD', own, '*', 'tenant', tenant, 'entry', entry) end
    streams[#streams + 1] = own
    trim_audit(own, args.max_audit)
  end
  if args.audit_s == cjson.null then return end
  for _, stream in ipairs(streams) do
    redis.call('XTRIM', stream, 'MINID', '~', string.format('%.0f', (now_s() - args.audit_s) * 1000))
  end
end

local function record_change(args, kind, name)
  publish(args.tenant, kind, name)
  append_audit(args)
end
