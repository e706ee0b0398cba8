-- Garbage collection: one gateway at a time, and the accounts of removed files.

local collection = {}

-- token, duration_s. Return `done` to the gateway that may collect now.
function collection.begin(args)
  if redis.call('SET', 'karst:collection', args.token, 'NX', 'EX', args.duration_s) then return DONE end
  return {outcome = 'in_use'}
end

-- token, duration_s. Keep the turn, or keep other gateways from the next one.
function collection.extend(args)
  if redis.call('GET', 'karst:collection') ~= args.token then return {outcome = 'in_use'} end
  redis.call('EXPIRE', 'karst:collection', args.duration_s)
  return DONE
end

-- digest. The store has no file of this digest any more.
function collection.release(args)
  if redis.call('HEXISTS', 'karst:digests', args.digest) == 1 or is_reserved(args.digest) then
    return {outcome = 'in_use'}
  end
  remove_orphan(args.digest)
  return DONE
end

return cjson.encode(collection[ARGV[1]](cjson.decode(ARGV[2])))
