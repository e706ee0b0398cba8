-- Records of a dataset's images and the indexes over them: helpers of the families `datasets` and `kept`.
--
-- A record (JSON text) has n (its place in the order of arrival), l (ids of its labels), s (its split: auto, train or
-- test), u (its use: train or test), size, at (milliseconds since 1970) and name. Records keep the ids of labels:
-- a new name of a label then changes no record, and `merged` leads from the id of a merged label to its heir. A classified
-- image that was kept also has k (when it expires without a label, in milliseconds since 1970) and p (what was answered).

-- Return a list, or nil in place of an empty one, which cjson would write as an object.
local function some(list)
  if #list > 0 then return list end
end

local function key(args, name)
  return dataset_key(args.tenant, args.task, name)
end

-- Return the id by which a label is indexed: the last one of a chain of merges, which becomes shorter by this call.
local function heir(args, id)
  local last, steps = id, 0
  local following = redis.call('HGET', key(args, 'merged'), last)
  while following do
    last, steps = following, steps + 1
    following = redis.call('HGET', key(args, 'merged'), last)
  end
  if steps > 1 then redis.call('HSET', key(args, 'merged'), id, last) end
  return last
end

-- Add an image to (ZADD) or remove it from (ZREM) every index that it belongs to.
local function update_indexes(args, command, digest, record)
  local labels = record.l
  if #labels == 0 then labels = {''} end
  for _, used in ipairs({'*', record.u}) do
    local keys = {index_key(args.tenant, args.task, used)}
    for _, label in ipairs(labels) do
      keys[#keys + 1] = index_key(args.tenant, args.task, used, heir(args, label))
    end
    for _, index in ipairs(keys) do
      if command == 'ZADD' then redis.call('ZADD', index, record.n, digest) else redis.call('ZREM', index, digest) end
    end
  end
  if command == 'ZADD' and record.k and #record.l == 0 then
    redis.call('ZADD', key(args, 'kept'), string.format('%.0f', record.k), digest)
    if not args.staged then redis.call('SADD', 'karst:kept', args.tenant .. ':' .. args.task) end
  elseif record.k then
    redis.call('ZREM', key(args, 'kept'), digest)
  end
end

local function read_record(args, digest)
  local text = redis.call('HGET', key(args, 'images'), digest)
  return text and cjson.decode(text)
end

local function write_record(args, digest, record)
  redis.call('HSET', key(args, 'images'), digest, cjson.encode(record))
  update_indexes(args, 'ZADD', digest, record)
end

-- Note how a label is spelled without case, spaces and Unicode form.
local function put_fold(args, id, fold)
  redis.call('HSETNX', key(args, 'folds'), fold, id)
  redis.call('HSET', key(args, 'fold-of'), id, fold)
end

local function drop_fold(args, id)
  local fold = redis.call('HGET', key(args, 'fold-of'), id)
  if not fold then return end -- a label of an older hub
  redis.call('HDEL', key(args, 'fold-of'), id)
  if redis.call('HGET', key(args, 'folds'), fold) == id then redis.call('HDEL', key(args, 'folds'), fold) end
end

-- Forget a label without images. The work must not depend on the number of labels: an upload calls this for each image.
local function drop_if_unused(args, id)
  if id == '' or redis.call('EXISTS', index_key(args.tenant, args.task, '*', id)) == 1 then return end
  local name = redis.call('HGET', key(args, 'labels'), id)
  if not name then return end
  redis.call('HDEL', key(args, 'labels'), id)
  redis.call('HDEL', key(args, 'names'), name)
  drop_fold(args, id)
end

-- Return the names of a record's labels. `known` (id -> name) spares a page the reads of labels that it has seen.
local function names_of(args, record, known)
  local names = {}
  for i, id in ipairs(record.l) do
    known[id] = known[id] or redis.call('HGET', key(args, 'labels'), heir(args, id))
    names[i] = known[id]
  end
  return names
end

-- Return the id of a label, which is created if it does not exist; nil if the dataset may have no more labels. Also
-- return an older label that differs only in case, spaces or Unicode form.
local function label_id(args, name, fold)
  local id = redis.call('HGET', key(args, 'names'), name)
  if id then return id end
  if redis.call('HLEN', key(args, 'names')) >= args.max_labels then return nil end
  id = string.format('%.0f', redis.call('HINCRBY', key(args, 'info'), 'last_label', 1))
  redis.call('HSET', key(args, 'names'), name, id)
  redis.call('HSET', key(args, 'labels'), id, name)
  local other = redis.call('HGET', key(args, 'folds'), fold)
  local similar = other and redis.call('HGET', key(args, 'labels'), other)
  if other and not similar then redis.call('HDEL', key(args, 'folds'), fold) end
  put_fold(args, id, fold)
  return id, similar or nil
end

-- Return a limit of the tenant. Tenants of an older hub have none.
local function limit_of(args, name)
  local info = cjson.decode(redis.call('HGET', 'karst:tenants', args.tenant))
  return tonumber(info.limits[name] or args.limits[name])
end

-- Return why the tenant may not add an image of this size, or nil.
local function full(args, size)
  if tonumber(redis.call('GET', tenant_key(args.tenant, 'images')) or 0) >= limit_of(args, 'images') then
    return 'images'
  end
  local bytes = tonumber(redis.call('GET', tenant_key(args.tenant, 'image_bytes')) or 0)
  if bytes + size > limit_of(args, 'image_bytes') then return 'image_bytes' end
end

local function find_refusal(args)
  if is_revoked(args.entry) then return REVOKED end
  if redis.call('HEXISTS', 'karst:tenants', args.tenant) == 0 then return {outcome = 'no_tenant'} end
  if redis.call('EXISTS', task_key(args.tenant, args.task)) == 0 then return ABSENT end
end

-- Return why the caller may not change the dataset now, or nil. A change counts against the tenant's changes a minute.
local function find_change_refusal(args)
  return find_refusal(args) or take_change(args)
end

local function count_in_dataset(args, images, bytes)
  redis.call('HINCRBY', key(args, 'info'), 'images', images)
  redis.call('HINCRBY', key(args, 'info'), 'bytes', string.format('%.0f', bytes))
  count_images(args.tenant, images, bytes)
end

local function now_ms()
  local clock = redis.call('TIME')
  return tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
end

-- Give an image that exists another label or split. `label` nil: the same labels; ids {}: none. Return what changed.
local function move(args, digest, record, ids, split, used)
  local before = names_of(args, record, {})
  local labels = ids or record.l
  if table.concat(labels, ',') == table.concat(record.l, ',') and split == record.s then return nil end
  update_indexes(args, 'ZREM', digest, record)
  local old = record.l
  record.l, record.s, record.u = labels, split, used
  write_record(args, digest, record)
  for _, id in ipairs(old) do drop_if_unused(args, heir(args, id)) end
  return before
end

-- Add one image. Return its status: added, there, moved, or the reason of a refusal.
local function add(args, image)
  local record = read_record(args, image.digest)
  if record and image.kept then return {status = 'there'} end
  if record and record.k then -- the owner sends a kept image, which then stays
    update_indexes(args, 'ZREM', image.digest, record)
    record.k = nil
    write_record(args, image.digest, record)
  end
  local reason = not record and full(args, image.size)
  if reason then return {status = 'limit', limit = reason, maximum = limit_of(args, reason)} end
  if not record and redis.call('EXISTS', 'karst:image-gc:' .. image.digest) == 1 then return {status = 'removing'} end
  local ids, similar = nil, nil
  if image.label ~= '' then
    local id, other = label_id(args, image.label, image.fold)
    if not id then return {status = 'labels'} end
    ids, similar = {id}, other
  end
  if record then
    if ids and #record.l == 1 and heir(args, record.l[1]) == ids[1] then ids = nil end
    local split, used = image.split, image.used
    if split == '' then split, used = record.s, record.u end
    local before = move(args, image.digest, record, ids, split, used)
    if not before then return {status = 'there'} end
    return {status = 'moved', before = before[1], similar = similar}
  end
  local split = image.split
  if split == '' then split = 'auto' end
  record = {
    n = redis.call('HINCRBY', key(args, 'info'), 'last', 1), l = ids or {}, s = split, u = image.used,
    size = image.size, name = image.name, at = image.at or now_ms(), k = image.kept, p = image.answer,
  }
  write_record(args, image.digest, record)
  count_in_dataset(args, 1, image.size)
  if redis.call('HINCRBY', 'karst:images', image.digest, 1) == 1 then
    redis.call('ZADD', 'karst:pending', math.floor(now_s()) + args.patience_s, image.digest)
  end
  return {status = 'added', similar = similar}
end

-- Remove images. Return their number, and the digests of files that no dataset holds any more.
local function remove_images(args, digests)
  local orphans, removed = {}, 0
  for _, digest in ipairs(digests) do
    local record = read_record(args, digest)
    if record then
      update_indexes(args, 'ZREM', digest, record)
      redis.call('HDEL', key(args, 'images'), digest)
      count_in_dataset(args, -1, -record.size)
      for _, id in ipairs(record.l) do drop_if_unused(args, heir(args, id)) end
      removed = removed + 1
      if release_file('', digest) then orphans[#orphans + 1] = digest end
    end
  end
  return removed, orphans
end

