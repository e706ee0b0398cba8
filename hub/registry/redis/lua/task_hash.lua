-- Helpers for the Redis hash of one task. `hub/registry/models.py` lists its fields.

local MAX_FORMER_NAMES = 10000 -- of deleted tasks whose last version number a tenant keeps

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

-- Add the task to (SADD) or remove it from (SREM) every list that its sharing (JSON text or false) names.
local function update_shared_lists(command, tenant, task, sharing)
  if not sharing then return end
  local body = cjson.decode(sharing)
  if body.public then redis.call(command, 'karst:public', tenant .. ':' .. task) end
  for _, other in ipairs(body.tenants) do
    if redis.call(command, tenant_key(other, 'shared'), tenant .. ':' .. task) == 1 then
      count_share(tenant, other, command == 'SADD' and 1 or -1)
    end
  end
end

-- Return a sharing (public or not, a list of names) as JSON text. cjson would write an empty list as {}.
local function sharing_text(public, names)
  local quoted = {}
  for i, name in ipairs(names) do quoted[i] = '"' .. name .. '"' end
  return '{"public":' .. tostring(public) .. ',"tenants":[' .. table.concat(quoted, ',') .. ']}'
end

-- Return the names of a sharing (JSON text) that no tenant has, and the names that a tenant has.
local function split_names(sharing)
  local absent, known = {}, {}
  for _, name in ipairs(cjson.decode(sharing).tenants) do
    local names = redis.call('HEXISTS', 'karst:tenants', name) == 1 and known or absent
    names[#names + 1] = name
  end
  return absent, known
end

-- Return why a tenant may not share a task like this, or nil. max_shares: names of all its tasks together. max_with_one:
-- its tasks that it shares with one tenant.
local function share_refusal(tenant, task, former, sharing, max_shares, max_with_one)
  local added = #cjson.decode(sharing).tenants - (former and #cjson.decode(former).tenants or 0)
  local shares = tonumber(redis.call('HGET', tenant_key(tenant, 'shares'), '') or 0)
  if added > 0 and shares + added > max_shares then return limit_reached('shares', max_shares) end
  for _, other in ipairs(cjson.decode(sharing).tenants) do
    local is_shared = redis.call('SISMEMBER', tenant_key(other, 'shared'), tenant .. ':' .. task) == 1
    local count = tonumber(redis.call('HGET', tenant_key(tenant, 'shares'), other) or 0)
    if not is_shared and count >= max_with_one then return limit_reached('shared_with_one', max_with_one) end
  end
  return nil
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
  forget_number(tenant, task)
  return redis.call('DEL', key)
end
