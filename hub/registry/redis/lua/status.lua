-- Status reports of workers, and errors of gateways.

local status = {}

-- worker, report (JSON text), expiry_s. Store a worker's report and delete expired reports of other workers.
function status.report(args)
  local now = tonumber(redis.call('TIME')[1])
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', 'karst:workers:at', '-inf', now - args.expiry_s)) do
    redis.call('HDEL', 'karst:workers', worker)
    redis.call('ZREM', 'karst:workers:at', worker)
  end
  redis.call('HSET', 'karst:workers', args.worker, args.report)
  redis.call('ZADD', 'karst:workers:at', now, args.worker)
  return {outcome = 'done'}
end

-- errors (kind -> number), expiry_s. Add errors to those of this minute by Redis' clock.
function status.count_errors(args)
  local key = 'karst:errors:' .. string.format('%.0f', math.floor(tonumber(redis.call('TIME')[1]) / 60))
  for kind, number in pairs(args.errors) do redis.call('HINCRBY', key, kind, string.format('%.0f', number)) end
  redis.call('EXPIRE', key, args.expiry_s)
  return {outcome = 'done'}
end

return cjson.encode(status[ARGV[1]](cjson.decode(ARGV[2])))
