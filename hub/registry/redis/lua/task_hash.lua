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

-- Return the size of a version's file. A version of an older hub has no summary, so its whole text is decoded.
local function file_size(key, number)
  local summary = redis.call('HGET', key, 'i:' .. number)
  if summary then return string.match(summary, '^%d+') end
  return string.format('%.0f', cjson.decode(redis.call('HGET', key, 'v:' .. number)).size_bytes)
end

-- Remove a version's claim on its file and its bytes.
local function release_version(tenant, key, number, digest)
  if redis.call('HINCRBY', 'karst:digests', digest, -1) <= 0 then redis.call('HDEL', 'karst:digests', digest) end
  redis.call('DECRBY', tenant_key(tenant, 'bytes'), file_size(key, number))
end

-- Count the bytes of a task's fields, in its field `b` and in the tenant's sum, after a change of the task.
local function count_registry_bytes(tenant, key)
  local bytes = 0
  for _, name in ipairs(redis.call('HKEYS', key)) do bytes = bytes + #name + redis.call('HSTRLEN', key, name) end
  local former = tonumber(redis.call('HGET', key, 'b') or 0)
  if former == 0 then bytes = bytes + 8 end -- about the bytes of `b` itself
  redis.call('INCRBY', tenant_key(tenant, 'registry'), string.format('%.0f', bytes - former))
  redis.call('HSET', key, 'b', string.format('%.0f', bytes))
end

-- Return a refusal if the tenant's tasks would take more bytes than max_registry_bytes, or nil.
local function registry_refusal(tenant, added_bytes, max_registry_bytes)
  local used = tonumber(redis.call('GET', tenant_key(tenant, 'registry')) or 0)
  if used + added_bytes > max_registry_bytes then return limit_reached('registry_bytes', max_registry_bytes) end
end

-- Add the task to or remove it from every list that its sharing (JSON text or false) names.
local function update_shared_lists(is_added, tenant, task, sharing)
  if not sharing then return end
  adopt_former_public()
  local body, name = cjson.decode(sharing), tenant .. ':' .. task
  if body.public then
    if is_added then redis.call('ZADD', PUBLIC, 0, name) else redis.call('ZREM', PUBLIC, name) end
  end
  for _, other in ipairs(body.tenants) do
    redis.call(is_added and 'SADD' or 'SREM', tenant_key(other, 'shared'), name)
  end
end

-- Delete a task with its versions. Return whether there was one. Redis frees the memory on a thread of its own.
local function drop_task(tenant, task)
  local key = task_key(tenant, task)
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local digest = string.match(field, '^d:(.+)$')
    if digest then release_version(tenant, key, redis.call('HGET', key, field), digest) end
  end
  update_shared_lists(false, tenant, task, redis.call('HGET', key, 'share'))
  redis.call('SREM', tenant_key(tenant, 'tasks'), task)
  redis.call('DECRBY', tenant_key(tenant, 'registry'), redis.call('HGET', key, 'b') or 0)
  return redis.call('UNLINK', key) == 1
end
