-- Orphans: files that no version refers to. Their bytes count against a tenant until a collection has removed them. A
-- registration makes its file an orphan before it writes the file, so every file of the store belongs to a tenant.

-- Return tenant, size and due time of an orphan, or nil. A collection may remove it from the due time on.
local function find_orphan(digest)
  local tenant = redis.call('HGET', 'karst:orphans', digest)
  if not tenant then return nil end
  local stored = redis.call('HGET', tenant_key(tenant, 'orphans'), digest) or '0:0'
  local size_bytes, due = string.match(stored, '^(%d+):(%d+)$')
  return tenant, tonumber(size_bytes), tonumber(due)
end

local function remove_orphan(digest)
  local tenant, size_bytes = find_orphan(digest)
  if not tenant then return end
  redis.call('HDEL', 'karst:orphans', digest)
  redis.call('HDEL', tenant_key(tenant, 'orphans'), digest)
  redis.call('DECRBY', tenant_key(tenant, 'deleted'), string.format('%.0f', size_bytes))
end

-- Count a file against the tenant, or against the tenant that it counts against already. No collection removes the file
-- for wait_s seconds.
local function add_orphan(tenant, digest, size_bytes, wait_s)
  local owner, counted_bytes, due = find_orphan(digest)
  if not owner then
    redis.call('HSET', 'karst:orphans', digest, tenant)
    redis.call('INCRBY', tenant_key(tenant, 'deleted'), string.format('%.0f', size_bytes))
    owner, counted_bytes, due = tenant, size_bytes, 0
  end
  due = math.max(due, tonumber(redis.call('TIME')[1]) + wait_s)
  redis.call('HSET', tenant_key(owner, 'orphans'), digest, string.format('%.0f:%.0f', counted_bytes, due))
end

-- Return whether a registration is about to refer to the file.
local function is_reserved(digest)
  local tenant, _, due = find_orphan(digest)
  return tenant and due > tonumber(redis.call('TIME')[1])
end

-- Return the bytes that the tenant has in the store, those of its orphans included, without the orphan `digest`.
local function used_bytes(tenant, digest)
  local used = tonumber(redis.call('GET', tenant_key(tenant, 'bytes')) or 0)
  used = used + tonumber(redis.call('GET', tenant_key(tenant, 'deleted')) or 0)
  local owner, size_bytes = find_orphan(digest)
  if owner == tenant then used = used - size_bytes end
  return used
end

-- Remove the accounts of a tenant that is deleted. The next collection finds the files by itself.
local function drop_orphans(tenant)
  for _, digest in ipairs(redis.call('HKEYS', tenant_key(tenant, 'orphans'))) do
    redis.call('HDEL', 'karst:orphans', digest)
  end
  redis.call('DEL', tenant_key(tenant, 'orphans'), tenant_key(tenant, 'deleted'))
end
