-- Classified images that a task's owner keeps for review.

local kept = {}

-- images (as in `datasets.add`, without labels, each with kept: when it expires, in milliseconds since 1970, and answer:
-- what was answered), per_day, limits, patience_s, entry. Return each image's status: that of `add`, or `day` where the
-- day has its images.
function kept.keep(args)
  local refusal = find_refusal(args)
  if refusal then return refusal end
  local info, day = key(args, 'info'), math.floor(now_ms() / 86400000)
  local stored = redis.call('HMGET', info, 'kept_day', 'kept_images')
  local images = tonumber(stored[1] or 0) == day and tonumber(stored[2]) or 0
  local before, statuses = images, {}
  for i, image in ipairs(args.images) do
    if images >= args.per_day and not read_record(args, image.digest) then
      statuses[i] = {status = 'day'}
    else
      statuses[i] = add(args, image)
      if statuses[i].status == 'added' then images = images + 1 end
    end
  end
  if images > before then
    redis.call('HSET', info, 'kept_day', string.format('%.0f', day), 'kept_images', string.format('%.0f', images))
    publish(args.tenant, 'dataset', args.task)
  end
  return {outcome = 'done', text = cjson.encode(statuses)}
end

-- count, entry. Remove images that have expired without a label. Return their number, and the digests of files that no
-- dataset holds any more.
function kept.expire(args)
  local index = key(args, 'kept')
  local digests = redis.call('ZRANGEBYSCORE', index, '-inf', now_ms(), 'LIMIT', 0, args.count)
  local removed, orphans = remove_images(args, digests)
  if redis.call('EXISTS', index) == 0 then redis.call('SREM', 'karst:kept', args.tenant .. ':' .. args.task) end
  if removed == 0 then return DONE end
  record_change(args, 'dataset', args.task)
  return {outcome = 'done', number = removed, names = some(orphans)}
end

return cjson.encode(kept[ARGV[1]](cjson.decode(ARGV[2])))
