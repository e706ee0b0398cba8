-- Changes of tenants. Every function takes tenant and entry (the audit entry's JSON text).

local tenants = {}

-- info (JSON text).
function tenants.create(args)
  if is_revoked(args.entry) then return REVOKED end
  if redis.call('HSETNX', 'karst:tenants', args.tenant, args.info) == 0 then return {outcome = 'exists'} end
  record_change(args.tenant, 'tenant', args.tenant, args.entry)
  return DONE
end

-- limits: the limits to change. Return the tenant's info (JSON text).
function tenants.set_limits(args)
  if is_revoked(args.entry) then return REVOKED end
  local info = redis.call('HGET', 'karst:tenants', args.tenant)
  if not info then return ABSENT end
  info = cjson.decode(info)
  for name, value in pairs(args.limits) do info.limits[name] = value end
  info = cjson.encode(info)
  redis.call('HSET', 'karst:tenants', args.tenant, info)
  record_change(args.tenant, 'tenant', args.tenant, args.entry)
  return {outcome = 'done', text = info}
end

-- Remove the tenant from the sharing of another tenant's task (`owner:task`). Otherwise a new tenant of the same name
-- would see the task.
local function end_sharing(tenant, name)
  local owner, task = string.match(name, '^([^:]+):(.+)$')
  local key = task_key(owner, task)
  local sharing = redis.call('HGET', key, 'share')
  if not sharing then return end
  local body, others = cjson.decode(sharing), {}
  for _, other in ipairs(body.tenants) do
    if other ~= tenant then others[#others + 1] = '"' .. other .. '"' end
  end
  -- cjson would write an empty list as {}.
  local text = '{"public":' .. tostring(body.public) .. ',"tenants":[' .. table.concat(others, ',') .. ']}'
  redis.call('HSET', key, 'share', text)
  count_registry_bytes(owner, key)
  publish(owner, 'task', task)
end

-- max_versions. Delete tasks of the tenant until these have as many versions, at least one task. The outcome is `in_use`
-- while further tasks exist: a deletion of all tasks in one step could keep Redis busy for seconds.
function tenants.drop_tasks(args)
  if is_revoked(args.entry) then return REVOKED end
  local versions = 0
  for _, task in ipairs(redis.call('SMEMBERS', tenant_key(args.tenant, 'tasks'))) do
    if versions >= args.max_versions then return {outcome = 'in_use'} end
    versions = versions + 1 + tonumber(redis.call('HGET', task_key(args.tenant, task), 'n') or 0)
    drop_task(args.tenant, task)
    publish(args.tenant, 'task', task)
  end
  return DONE
end

-- Delete the tenant with its tasks, keys, counts and own audit.
function tenants.delete(args)
  if is_revoked(args.entry) then return REVOKED end
  if redis.call('HDEL', 'karst:tenants', args.tenant) == 0 then return ABSENT end
  for _, task in ipairs(redis.call('SMEMBERS', tenant_key(args.tenant, 'tasks'))) do drop_task(args.tenant, task) end
  for _, name in ipairs(redis.call('SMEMBERS', tenant_key(args.tenant, 'shared'))) do end_sharing(args.tenant, name) end
  for _, id in ipairs(redis.call('SMEMBERS', tenant_key(args.tenant, 'keys'))) do
    redis.call('HDEL', 'karst:keys', id)
    redis.call('HDEL', 'karst:used', id)
  end
  local names = {'tasks', 'numbers', 'bytes', 'registry', 'keys', 'shared', 'audit', 'rate', 'flight', 'settled', 'counts'}
  for _, name in ipairs(names) do redis.call('UNLINK', tenant_key(args.tenant, name)) end
  redis.call('ZREM', 'karst:active', args.tenant)
  record_change('', 'tenant', args.tenant, args.entry)
  return DONE
end

return cjson.encode(tenants[ARGV[1]](cjson.decode(ARGV[2])))
