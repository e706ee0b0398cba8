-- Helpers for the Redis hash of one task. `hub/registry/models.py` lists its fields.

local MAX_FORMER_NAMES = 10000 -- of deleted tasks whose last version number a tenant keeps

local function task_key(tenant, task)
  return tenant_key(tenant, 'task:' .. task)
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
  local size_bytes = file_size(key, number)
  if redis.call('HINCRBY', 'karst:digests', digest, -1) <= 0 then
    redis.call('HDEL', 'karst:digests', digest)
    add_orphan(tenant, digest, tonumber(size_bytes), 0)
  end
  redis.call('DECRBY', tenant_key(tenant, 'bytes'), size_bytes)
end

-- Count the bytes of a task's fields, in its field `b` and in the tenant's sum, after a change of the task.
local function count_registry_bytes(tenant, key)
  local bytes = 0
  for _, name in ipairs(redis.call('HKEYS', key)) do bytes = bytes + #name + redis.call('HSTRLEN', key, name) end
  local former = tonumber(redis.call('HGET', key, 'b') or 0)
  if former == 0 then bytes = bytes + 8 end -- about the bytes of `b` itself
  count_text_bytes(tenant, bytes - former)
  redis.call('HSET', key, 'b', string.format('%.0f', bytes))
end

-- Return a refusal if the tenant's tasks would take more bytes than max_registry_bytes, or nil.
local function registry_refusal(tenant, added_bytes, max_registry_bytes)
  if text_bytes(tenant) + added_bytes > max_registry_bytes then
    return limit_reached('registry_bytes', max_registry_bytes)
  end
end

-- Return the number of a task's next version. A name that is forgotten goes on after the number of all forgotten names.
local function next_number(tenant, task)
  local numbers = tenant_key(tenant, 'numbers')
  if redis.call('HEXISTS', numbers, task) == 0 then
    redis.call('HSET', numbers, task, redis.call('GET', tenant_key(tenant, 'floor')) or 0)
  end
  return string.format('%.0f', redis.call('HINCRBY', numbers, task, 1))
end

-- Forget the last number of a deleted task where the tenant has many such names, without using a number twice.
local function forget_number(tenant, task)
  local numbers, floor = tenant_key(tenant, 'numbers'), tenant_key(tenant, 'floor')
  if redis.call('HLEN', numbers) <= redis.call('SCARD', tenant_key(tenant, 'tasks')) + MAX_FORMER_NAMES then return end
  local last = tonumber(redis.call('HGET', numbers, task) or 0)
  redis.call('SET', floor, string.format('%.0f', math.max(last, tonumber(redis.call('GET', floor) or 0))))
  redis.call('HDEL', numbers, task)
end

-- Count one task more (1) or less (-1) that a tenant shares with another one; the field '' has the sum.
local function count_share(tenant, other, by)
  local key = tenant_key(tenant, 'shares')
  for _, name in ipairs({other, ''}) do
    if redis.call('HINCRBY', key, name, by) <= 0 then redis.call('HDEL', key, name) end
  end
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
    if redis.call(is_added and 'SADD' or 'SREM', tenant_key(other, 'shared'), name) == 1 then
      count_share(tenant, other, is_added and 1 or -1)
    end
  end
end

-- Delete a task with its versions and its dataset. Return whether there was one. Redis frees the memory on a thread of
-- its own.
local function drop_task(tenant, task)
  local key = task_key(tenant, task)
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local digest = string.match(field, '^d:(.+)$')
    if digest then release_version(tenant, key, redis.call('HGET', key, field), digest) end
  end
  update_shared_lists(false, tenant, task, redis.call('HGET', key, 'share'))
  drop_dataset(tenant, task)
  redis.call('SREM', tenant_key(tenant, 'tasks'), task)
  forget_number(tenant, task)
  count_text_bytes(tenant, -tonumber(redis.call('HGET', key, 'b') or 0))
  return redis.call('UNLINK', key) == 1
end
