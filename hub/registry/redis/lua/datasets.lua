-- Changes and reads of datasets. Changes take tenant, task and entry (the audit entry's JSON text).
--
-- A record (JSON text) has n (its place in the order of arrival), l (ids of its labels), s (its split: auto, train or
-- test), u (its use: train or test), size, at (milliseconds since 1970) and name. Records keep the ids of labels:
-- a new name of a label then changes no record, and `merged` leads from the id of a merged label to its heir.

local datasets = {}
local USES = {'train', 'test'}

-- Return a list, or nil in place of an empty one, which cjson would write as an object.
local function some(list)
  if #list > 0 then return list end
end

local function key(args, name)
  return dataset_key(args.tenant, args.task, name)
end

-- Return the id by which a label is indexed.
local function heir(args, id)
  return redis.call('HGET', key(args, 'merged'), id) or id
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
end

local function read_record(args, digest)
  local text = redis.call('HGET', key(args, 'images'), digest)
  return text and cjson.decode(text)
end

local function write_record(args, digest, record)
  redis.call('HSET', key(args, 'images'), digest, cjson.encode(record))
  update_indexes(args, 'ZADD', digest, record)
end

-- Forget a label without images.
local function drop_if_unused(args, id)
  if id == '' or redis.call('EXISTS', index_key(args.tenant, args.task, '*', id)) == 1 then return end
  local name = redis.call('HGET', key(args, 'labels'), id)
  if not name then return end
  redis.call('HDEL', key(args, 'labels'), id)
  redis.call('HDEL', key(args, 'names'), name)
  local folds, merged = redis.call('HGETALL', key(args, 'folds')), redis.call('HGETALL', key(args, 'merged'))
  for i = 1, #folds, 2 do
    if folds[i + 1] == id then redis.call('HDEL', key(args, 'folds'), folds[i]) end
  end
  for i = 1, #merged, 2 do
    if merged[i + 1] == id then redis.call('HDEL', key(args, 'merged'), merged[i]) end
  end
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
  if other then return id, redis.call('HGET', key(args, 'labels'), other) end
  redis.call('HSET', key(args, 'folds'), fold, id)
  return id
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
    size = image.size, name = image.name, at = now_ms(),
  }
  write_record(args, image.digest, record)
  count_in_dataset(args, 1, image.size)
  if redis.call('HINCRBY', 'karst:images', image.digest, 1) == 1 then
    redis.call('ZADD', 'karst:pending', math.floor(record.at / 1000) + args.patience_s, image.digest)
  end
  return {status = 'added', similar = similar}
end

-- images: list of {digest, label ('': none), fold, split ('': auto, or unchanged), used, size, name};
-- max_labels, limits (defaults), audited (whether an earlier step of the same request wrote the entry), patience_s (in
-- which the sending gateway computes the features itself). Return each image's status.
function datasets.add(args)
  local refusal = find_refusal(args)
  if not refusal and not args.audited then refusal = take_change(args) end
  if refusal then return refusal end
  local statuses, changed = {}, false
  for i, image in ipairs(args.images) do
    statuses[i] = add(args, image)
    changed = changed or statuses[i].status == 'added' or statuses[i].status == 'moved'
  end
  if changed then
    publish(args.tenant, 'dataset', args.task)
    if not args.audited then append_audit(args) end
  end
  return {outcome = 'done', created = changed, text = cjson.encode(statuses)}
end

-- images, size: of the images that a request is about to add. Change nothing.
function datasets.check_room(args)
  local refusal = find_refusal(args)
  if refusal then return refusal end
  local reason = full(args, 1)
  if reason then
    return {outcome = 'limit', limit = reason, maximum = string.format('%.0f', limit_of(args, reason))}
  end
  return DONE
end

-- digest, label (null: unchanged; '': none), fold, split ('': unchanged), used, max_labels.
function datasets.change(args)
  local refusal = find_change_refusal(args)
  if refusal then return refusal end
  local record = read_record(args, args.digest)
  if not record then return {outcome = 'no_image'} end
  local ids = nil
  if args.label == '' then
    ids = {}
  elseif args.label ~= cjson.null then
    local id = label_id(args, args.label, args.fold)
    if not id then return {outcome = 'labels_full'} end
    if not (#record.l == 1 and heir(args, record.l[1]) == id) then ids = {id} end
  end
  local split, used = args.split, args.used
  if split == '' then split, used = record.s, record.u end
  if move(args, args.digest, record, ids, split, used) then
    record_change(args, 'dataset', args.task)
  end
  return DONE
end

-- digests. Return those whose files no dataset holds any more.
function datasets.remove(args)
  local refusal = find_change_refusal(args)
  if refusal then return refusal end
  local orphans, removed = {}, 0
  for _, digest in ipairs(args.digests) do
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
  if removed == 0 then return {outcome = 'no_image'} end
  record_change(args, 'dataset', args.task)
  return {outcome = 'done', number = removed, names = some(orphans)}
end

-- old (its name), label and fold (the new one). Rename a label, or merge it into a label that exists.
function datasets.rename_label(args)
  local refusal = find_change_refusal(args)
  if refusal then return refusal end
  local names, labels = key(args, 'names'), key(args, 'labels')
  local id = redis.call('HGET', names, args.old)
  if not id then return {outcome = 'no_label'} end
  if args.old == args.label then return {outcome = 'done', created = false} end
  local target = redis.call('HGET', names, args.label)
  redis.call('HDEL', names, args.old)
  local folds = redis.call('HGETALL', key(args, 'folds'))
  for i = 1, #folds, 2 do
    if folds[i + 1] == id then redis.call('HDEL', key(args, 'folds'), folds[i]) end
  end
  if not target then
    redis.call('HSET', names, args.label, id)
    redis.call('HSET', labels, id, args.label)
    redis.call('HSETNX', key(args, 'folds'), args.fold, id)
    record_change(args, 'dataset', args.task)
    return {outcome = 'done', created = false}
  end
  for _, used in ipairs({'*', 'train', 'test'}) do
    local from, to = index_key(args.tenant, args.task, used, id), index_key(args.tenant, args.task, used, target)
    redis.call('ZUNIONSTORE', to, 2, to, from, 'AGGREGATE', 'MAX')
    redis.call('UNLINK', from)
  end
  local merged = redis.call('HGETALL', key(args, 'merged'))
  for i = 1, #merged, 2 do
    if merged[i + 1] == id then redis.call('HSET', key(args, 'merged'), merged[i], target) end
  end
  redis.call('HSET', key(args, 'merged'), id, target)
  redis.call('HDEL', labels, id)
  record_change(args, 'dataset', args.task)
  return {outcome = 'done', created = true}
end

local function shown(args, digest, text, known)
  local record = cjson.decode(text)
  return {digest = digest, labels = names_of(args, record, known), record = record}
end

-- label (null: any; '': unlabelled images), used ('*', 'train' or 'test'), before (a record's n; 0: from the newest),
-- count. Return a page, newest first.
function datasets.page(args)
  if redis.call('EXISTS', task_key(args.tenant, args.task)) == 0 then return ABSENT end
  local id = nil
  if args.label == '' then id = ''
  elseif args.label ~= cjson.null then
    id = redis.call('HGET', key(args, 'names'), args.label)
    if not id then return {outcome = 'done', text = '{}'} end
  end
  local newest = '+inf'
  if args.before > 0 then newest = '(' .. string.format('%.0f', args.before) end
  local index = index_key(args.tenant, args.task, args.used, id)
  local digests = redis.call('ZREVRANGEBYSCORE', index, newest, '-inf', 'LIMIT', 0, args.count)
  if #digests == 0 then return {outcome = 'done', text = '{}'} end
  local found, known = {}, {}
  for i, text in ipairs(redis.call('HMGET', key(args, 'images'), unpack(digests))) do
    found[i] = shown(args, digests[i], text, known)
  end
  return {outcome = 'done', text = cjson.encode(found)}
end

-- digest.
function datasets.find(args)
  local text = redis.call('HGET', key(args, 'images'), args.digest)
  if not text then return {outcome = 'no_image'} end
  return {outcome = 'done', text = cjson.encode(shown(args, args.digest, text, {}))}
end

-- Return the number of images by label and use, and the dataset's totals. ZCARD counts without a scan.
function datasets.describe(args)
  if redis.call('EXISTS', task_key(args.tenant, args.task)) == 0 then return ABSENT end
  local counts = {}
  local labels = redis.call('HGETALL', key(args, 'labels'))
  labels[#labels + 1], labels[#labels + 2] = '', ''
  for i = 1, #labels, 2 do
    local count = {label = labels[i + 1]}
    for _, used in ipairs(USES) do
      count[used] = redis.call('ZCARD', index_key(args.tenant, args.task, used, labels[i]))
    end
    counts[#counts + 1] = count
  end
  local totals = redis.call('HMGET', key(args, 'info'), 'images', 'bytes')
  local found = {labels = counts, images = tonumber(totals[1] or 0), bytes = tonumber(totals[2] or 0)}
  return {outcome = 'done', text = cjson.encode(found)}
end

-- count. Take images of deleted datasets off the list of files in use. Return those that no dataset holds any more, and
-- whether more are left.
function datasets.drain(args)
  local dropped = redis.call('SRANDMEMBER', 'karst:dropped')
  if not dropped then return {outcome = 'done', created = false} end
  local fields, orphans = redis.call('HSCAN', dropped, 0, 'COUNT', args.count)[2], {}
  for i = 1, #fields, 2 do
    local kind, digest = string.match(fields[i], '^([sr]?:?)(%x+)$')
    redis.call('HDEL', dropped, fields[i])
    local count = kind ~= '' and tonumber(fields[i + 1]) or 1 -- trainings that used the file
    if release_file(kind, digest, count) then orphans[#orphans + 1] = fields[i] end
  end
  if redis.call('EXISTS', dropped) == 0 then redis.call('SREM', 'karst:dropped', dropped) end
  return {outcome = 'done', created = redis.call('EXISTS', 'karst:dropped') == 1, names = some(orphans)}
end

-- digest, kind ('', 's:' or 'r:'), token, duration_s. No dataset may refer to the file until the claim ends.
function datasets.claim(args)
  if redis.call('HEXISTS', HOLDERS[args.kind], args.digest) == 1 then return {outcome = 'in_use'} end
  local set = redis.call('SET', 'karst:image-gc:' .. args.digest, args.token, 'NX', 'EX', args.duration_s)
  if not set then return {outcome = 'in_use'} end
  return DONE
end

-- digest, token. End a claim, unless it expired and another collection has claimed the file since.
function datasets.end_claim(args)
  local claim = 'karst:image-gc:' .. args.digest
  if redis.call('GET', claim) == args.token then redis.call('DEL', claim) end
  return DONE
end

-- count, duration_s. Return images without features; no other gateway gets them for this long.
function datasets.lease_pending(args)
  local now = tonumber(redis.call('TIME')[1])
  local digests = redis.call('ZRANGEBYSCORE', 'karst:pending', '-inf', now, 'LIMIT', 0, args.count)
  for _, digest in ipairs(digests) do redis.call('ZADD', 'karst:pending', now + args.duration_s, digest) end
  return {outcome = 'done', names = some(digests)}
end

-- digests, present (whether they have features now; otherwise they need new ones).
function datasets.note_features(args)
  local now = tonumber(redis.call('TIME')[1])
  for _, digest in ipairs(args.digests) do
    if args.present then redis.call('ZREM', 'karst:pending', digest)
    elseif redis.call('HEXISTS', 'karst:images', digest) == 1 then redis.call('ZADD', 'karst:pending', now, digest) end
  end
  return DONE
end

return cjson.encode(datasets[ARGV[1]](cjson.decode(ARGV[2])))
