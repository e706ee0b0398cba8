-- Leases of a tenant's rate limits. A gateway takes tokens and permits in lots, spends them, and writes counts back.

local leases = {}

-- Return whether the tenant is still the one that the gateway knows: a deleted tenant's name may be in use again.
local function exists(args)
  local info = redis.call('HGET', 'karst:tenants', args.tenant)
  return info and cjson.decode(info).created == args.created
end

-- Store a gateway's permits and images in flight until they expire.
local function store_permits(base, args, permits, now_ms)
  local value = string.format('%.0f:%.0f:%.0f', permits, args.in_flight, now_ms + args.expiry_ms)
  redis.call('HSET', base .. ':flight', args.gateway, value)
  redis.call('EXPIRE', base .. ':flight', 60)
end

-- Return the permits of the other gateways, and delete expired ones.
local function permits_of_others(base, gateway, now_ms)
  local total = 0
  local stored = redis.call('HGETALL', base .. ':flight')
  for i = 1, #stored, 2 do
    local permits, expires_ms = string.match(stored[i + 1], '([^:]+):[^:]+:([^:]+)')
    if tonumber(expires_ms) < now_ms then redis.call('HDEL', base .. ':flight', stored[i])
    elseif stored[i] ~= gateway then total = total + tonumber(permits) end
  end
  return total
end

-- tenant, created, gateway, limits: {requests_per_second, images_per_second, images_in_flight},
-- needed and wanted: {requests, images, permits}, permits and in_flight (of this gateway), expiry_ms.
-- Take at least what is needed and at most what is wanted, or nothing. A token bucket holds the tokens of one second. A
-- call that needs more waits for a full bucket and leaves a debt.
function leases.take(args)
  if not exists(args) then return {outcome = 'no_tenant'} end
  local base = 'karst:t:' .. args.tenant
  local clock = redis.call('TIME')
  local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
  local stored = redis.call('HMGET', base .. ':rate', 'requests', 'images', 'at')
  local elapsed = math.max(0, now - tonumber(stored[3] or 0))
  local taken, left, expiry_s = {}, {}, 60
  for i, name in ipairs({'requests', 'images'}) do
    local rate, needed = args.limits[name .. '_per_second'], args.needed[name]
    local capacity = math.max(1, rate)
    local tokens = math.min(capacity, tonumber(stored[i] or capacity) + elapsed * rate)
    local threshold = math.min(needed, capacity)
    if needed > 0 and tokens < threshold then
      return {outcome = 'limit', limit = name .. '_per_second', wait_s = (threshold - tokens) / rate}
    end
    taken[name] = math.max(needed, math.min(args.wanted[name], math.floor(tokens)))
    left[name] = tokens - taken[name]
    -- The key must outlive a debt; otherwise the tenant would not pay it.
    expiry_s = math.max(expiry_s, math.min(1e9, math.ceil((capacity - left[name]) / rate) + 1))
  end
  local free = args.limits.images_in_flight - permits_of_others(base, args.gateway, now * 1000) - args.permits
  if free < args.needed.permits then return {outcome = 'limit', limit = 'images_in_flight', wait_s = 1} end
  taken.permits = math.max(args.needed.permits, math.min(args.wanted.permits, free))
  store_permits(base, args, args.permits + taken.permits, now * 1000)
  redis.call('HSET', base .. ':rate', 'requests', tostring(left.requests), 'images', tostring(left.images),
    'at', string.format('%.6f', now))
  redis.call('EXPIRE', base .. ':rate', string.format('%.0f', expiry_s))
  return {outcome = 'done', requests = taken.requests, images = taken.images, permits = taken.permits}
end

-- tenant, created, gateway, permits and in_flight (of this gateway), expiry_ms, batch (its number), counts: name -> n.
-- Store the permits that the gateway keeps, and add its counts. A batch that arrives twice counts once.
function leases.settle(args)
  if not exists(args) then return {outcome = 'no_tenant'} end
  local base = 'karst:t:' .. args.tenant
  local now = tonumber(redis.call('TIME')[1])
  if args.permits == 0 then redis.call('HDEL', base .. ':flight', args.gateway)
  else store_permits(base, args, args.permits, now * 1000) end
  if next(args.counts) == nil then return {outcome = 'done'} end
  if tonumber(redis.call('HGET', base .. ':settled', args.gateway) or 0) < args.batch then
    redis.call('HSET', base .. ':settled', args.gateway, args.batch)
    redis.call('EXPIRE', base .. ':settled', 86400)
    for name, n in pairs(args.counts) do redis.call('HINCRBY', base .. ':counts', name, n) end
  end
  redis.call('ZADD', 'karst:active', now, args.tenant)
  redis.call('ZREMRANGEBYSCORE', 'karst:active', '-inf', now - 3600)
  return {outcome = 'done'}
end

return cjson.encode(leases[ARGV[1]](cjson.decode(ARGV[2])))
