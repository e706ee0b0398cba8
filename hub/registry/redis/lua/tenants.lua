-- Changes of tenants. Every function takes tenant and entry (the audit entry's JSON text).

local tenants = {}

-- Remove the tenant from the sharing of another tenant's task (`owner:task`). Otherwise a new tenant of the same name
-- would see the task.
local function end_sharing(tenant, name)
  local owner, task = string.match(name, '^([^:]+):(.+)$')
  local key = task_key(owner, task)
  local sharing = redis.call('HGET', key, 'share')
  if not sharing then return end
  local body, others = cjson.decode(sharing), {}
  for _, other in ipairs(body.tenants) do
    if other ~= tenant then others[#others + 1] = other end
  end
  redis.call('HSET', key, 'share', sharing_text(body.public, others))
  count_share(owner, tenant, -1)
  count_registry_bytes(owner, key)
  publish(owner, 'task', task)
end

local function end_all_sharing(tenant)
  local key = tenant_key(tenant, 'shared')
  for _, name in ipairs(redis.call('SMEMBERS', key)) do end_sharing(tenant, name) end
  redis.call('DEL', key)
end

-- info (JSON text).
function tenants.create(args)
  local refused = refusal_of(args)
  if refused then return refused end
  if redis.call('HSETNX', 'karst:tenants', args.tenant, args.info) == 0 then return {outcome = 'exists'} end
  -- An older hub shared with names that no tenant had. Such a share must not reach the new tenant.
  end_all_sharing(args.tenant)
  record_change(args, 'tenant', args.tenant)
  return DONE
end

-- limits: the limits to change. Return the tenant's info (JSON text).
function tenants.set_limits(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local info = redis.call('HGET', 'karst:tenants', args.tenant)
  if not info then return ABSENT end
  info = cjson.decode(info)
  for name, value in pairs(args.limits) do info.limits[name] = value end
  info = cjson.encode(info)
  redis.call('HSET', 'karst:tenants', args.tenant, info)
  record_change(args, 'tenant', args.tenant)
  return {outcome = 'done', text = info}
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
  local refused = refusal_of(args)
  if refused then return refused end
  if redis.call('HDEL', 'karst:tenants', args.tenant) == 0 then return ABSENT end
  for _, task in ipairs(redis.call('SMEMBERS', tenant_key(args.tenant, 'tasks'))) do drop_task(args.tenant, task) end
  drop_all_staged(args.tenant)
  end_all_sharing(args.tenant)
  for _, id in ipairs(redis.call('SMEMBERS', tenant_key(args.tenant, 'keys'))) do
    redis.call('HDEL', 'karst:keys', id)
    redis.call('HDEL', 'karst:used', id)
  end
  local names = {
    'tasks', 'numbers', 'floor', 'changes', 'shares', 'bytes', 'registry', 'images', 'image_bytes',
    'training_bytes', 'keys', 'shared', 'audit', 'rate', 'flight', 'settled', 'counts', 'usage_bytes', 'unsorted', 'by:name', 'by:labels', 'by:images',
    'by:accuracy', 'by:version', 'by:registered',
  }
  for _, name in ipairs(names) do redis.call('UNLINK', tenant_key(args.tenant, name)) end
  drop_orphans(args.tenant)
  redis.call('ZREM', 'karst:active', args.tenant)
  local name = args.tenant
  args.tenant = ''
  record_change(args, 'tenant', name)
  return DONE
end

return cjson.encode(tenants[ARGV[1]](cjson.decode(ARGV[2])))
