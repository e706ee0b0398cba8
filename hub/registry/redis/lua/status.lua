-- Status reports of workers.

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

return cjson.encode(status[ARGV[1]](cjson.decode(ARGV[2])))
