-- Helpers for the Redis hash of one task. `hub/registry/models.py` lists its fields.

local function task_key(tenant, task)
  return tenant_key(tenant, 'task:' .. task)
end

local function limit_reached(limit, maximum)
  -- As text: cjson would write 10^14 bytes as 1e+14.
  return {outcome = 'limit', limit = limit, maximum = string.format('%.0f', maximum)}
end

-- Return whether a garbage collection claims the file; a version must not refer to a file that is being removed.
local function is_being_removed(digest)
  return redis.call('EXISTS', 'karst:gc:' .. digest) == 1
end

-- Remove a version's (JSON text) claim on its file and its bytes. Return its digest.
local function release_version(tenant, version)
  local body = cjson.decode(version)
  if redis.call('HINCRBY', 'karst:digests', body.digest, -1) <= 0 then
    redis.call('HDEL', 'karst:digests', body.digest)
    add_orphan(tenant, body.digest, body.size_bytes, 0)
  end
  redis.call('DECRBY', tenant_key(tenant, 'bytes'), body.size_bytes)
  return body.digest
end

-- Add the task to (SADD) or remove it from (SREM) every list that its sharing (JSON text or false) names.
local function update_shared_lists(command, tenant, task, sharing)
  if not sharing then return end
  local body = cjson.decode(sharing)
  if body.public then redis.call(command, 'karst:public', tenant .. ':' .. task) end
  for _, other in ipairs(body.tenants) do
    redis.call(command, tenant_key(other, 'shared'), tenant .. ':' .. task)
  end
end

-- Delete a task with its versions. Return 0 if there is none.
local function drop_task(tenant, task)
  local key = task_key(tenant, task)
  local fields = redis.call('HGETALL', key)
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'v:' then release_version(tenant, fields[i + 1]) end
  end
  update_shared_lists('SREM', tenant, task, redis.call('HGET', key, 'share'))
  redis.call('SREM', tenant_key(tenant, 'tasks'), task)
  return redis.call('DEL', key)
end
