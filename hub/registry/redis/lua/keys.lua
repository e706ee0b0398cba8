-- Changes of API keys. `tenant` is '' for an admin key; `entry` is the audit entry's JSON text.

local keys = {}

local function key_set(tenant)
  if tenant == '' then return 'karst:admins' end
  return tenant_key(tenant, 'keys')
end

-- Return the date and time at which a key (JSON text) expires, or nil.
local function expiry(key)
  local expires = cjson.decode(key).expires
  if expires == cjson.null then return nil end
  return expires
end

-- Return whether an admin key without an expiry date exists, other than the one with this id. Without such a key the
-- hub would lose its last administrator on some day.
local function has_permanent_admin_key(except_id)
  for _, id in ipairs(redis.call('SMEMBERS', 'karst:admins')) do
    local key = redis.call('HGET', 'karst:keys', id)
    if key and id ~= except_id and not expiry(key) then return true end
  end
  return false
end

-- id, key (JSON text), max_keys.
function keys.create(args)
  local refused = refusal_of(args)
  if refused then return refused end
  if args.tenant ~= '' and redis.call('HEXISTS', 'karst:tenants', args.tenant) == 0 then return ABSENT end
  local set = key_set(args.tenant)
  if redis.call('SCARD', set) >= args.max_keys then return {outcome = 'limit', limit = 'keys'} end
  if args.tenant == '' and expiry(args.key) and not has_permanent_admin_key('') then
    return {outcome = 'no_permanent_key'}
  end
  redis.call('SADD', set, args.id)
  redis.call('HSET', 'karst:keys', args.id, args.key)
  record_change(args, 'key', args.id)
  return DONE
end

-- id, now (in the format of `expires`). An expired admin key can always be revoked.
function keys.revoke(args)
  if is_revoked(args.entry) then return REVOKED end -- never too many: a stolen key must not prevent its revocation
  local set = key_set(args.tenant)
  if redis.call('SISMEMBER', set, args.id) == 0 then return ABSENT end
  if args.tenant == '' and not has_permanent_admin_key(args.id) then
    local key = redis.call('HGET', 'karst:keys', args.id)
    local expires = key and expiry(key)
    if key and (not expires or expires > args.now) then return {outcome = 'no_permanent_key'} end
  end
  redis.call('SREM', set, args.id)
  redis.call('HDEL', 'karst:keys', args.id)
  redis.call('HDEL', 'karst:used', args.id)
  record_change(args, 'key', args.id)
  return DONE
end

-- times: id -> seconds since 1970.
function keys.record_use(args)
  for id, seconds in pairs(args.times) do
    -- A revoked key leaves no trace.
    if redis.call('HEXISTS', 'karst:keys', id) == 1 then redis.call('HSET', 'karst:used', id, seconds) end
  end
  return DONE
end

return cjson.encode(keys[ARGV[1]](cjson.decode(ARGV[2])))
