-- Trainings of a task. Every function takes tenant and task.

local trainings = {}

local function key(args, name)
  return dataset_key(args.tenant, args.task, name)
end

-- id, body (JSON text), snapshot (digest), max_trainings, entry, audited (whether to write the entry). Add a training, or
-- replace its body. Return the snapshots of the oldest trainings that were dropped and that no other training uses.
function trainings.put(args)
  if is_revoked(args.entry) then return REVOKED end
  local refusal = not args.audited and take_change(args)
  if refusal then return refusal end
  if redis.call('EXISTS', task_key(args.tenant, args.task)) == 0 then return ABSENT end
  if redis.call('EXISTS', 'karst:image-gc:' .. args.snapshot) == 1 then return {outcome = 'removing'} end
  local orphans = {}
  if redis.call('HSET', key(args, 'trainings'), args.id, args.body) == 1 then
    redis.call('HINCRBY', 'karst:snapshots', args.snapshot, 1)
    redis.call('ZADD', key(args, 'training-order'), redis.call('HINCRBY', key(args, 'info'), 'last', 1), args.id)
    while redis.call('ZCARD', key(args, 'training-order')) > args.max_trainings do
      local oldest = redis.call('ZPOPMIN', key(args, 'training-order'))[1]
      local snapshot = cjson.decode(redis.call('HGET', key(args, 'trainings'), oldest)).snapshot.digest
      redis.call('HDEL', key(args, 'trainings'), oldest)
      if release_file('s:', snapshot) then orphans[#orphans + 1] = 's:' .. snapshot end
    end
  end
  if args.audited then record_change(args, 'dataset', args.task) end
  local names = nil
  if #orphans > 0 then names = orphans end
  return {outcome = 'done', names = names}
end

return cjson.encode(trainings[ARGV[1]](cjson.decode(ARGV[2])))
