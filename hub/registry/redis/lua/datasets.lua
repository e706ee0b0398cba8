-- Changes and reads of datasets. Changes take tenant, task and entry (the audit entry's JSON text).

local datasets = {}
local USES = {'train', 'test'}
local RELABELLED = 100 -- images of a label whose records are changed when it is merged into another label

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

-- images (as in `add`, also with at, kept and answer), training (null, or {id, snapshot, body}: one that has ended), max_labels,
-- limits, patience_s, staged (true). Add to a staged dataset: one of an import whose task does not exist yet. Its name in
-- `task` is no valid name of a task.
function datasets.stage(args)
  if is_revoked(args.entry) then return REVOKED end
  if redis.call('HEXISTS', 'karst:tenants', args.tenant) == 0 then return {outcome = 'no_tenant'} end
  local training = args.training
  if training ~= cjson.null and redis.call('EXISTS', 'karst:image-gc:' .. training.snapshot) == 1 then
    return {outcome = 'removing'}
  end
  redis.call('ZADD', STAGED, math.floor(now_s()), args.tenant .. ':' .. args.task)
  local statuses = {}
  for i, image in ipairs(args.images) do statuses[i] = add(args, image) end
  local head = training ~= cjson.null and head_of(cjson.decode(training.body), #training.body)
  if head and write_training(args.tenant, args.task, head, training.body) then
    redis.call('HINCRBY', 'karst:snapshots', training.snapshot, 1)
    redis.call('ZADD', key(args, 'training-order'), redis.call('HINCRBY', key(args, 'info'), 'last', 1), training.id)
  end
  return {outcome = 'done', text = cjson.encode(statuses)}
end

-- Remove a staged dataset, unless its task exists by now.
function datasets.drop_staged(args)
  drop_staged(args.tenant .. ':' .. args.task)
  return DONE
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

-- digests, label (null: unchanged; '': none), fold, split ('': unchanged), used (of each image), max_labels. Return the
-- number of changed images, and the digests of absent ones.
function datasets.change(args)
  local refusal = find_change_refusal(args)
  if refusal then return refusal end
  local records, absent, changed = {}, {}, 0
  for i, digest in ipairs(args.digests) do
    records[i] = read_record(args, digest) or false
    if not records[i] then absent[#absent + 1] = digest end
  end
  if #absent == #args.digests then return {outcome = 'no_image'} end
  local ids, label = nil, nil
  if args.label == '' then
    ids = {}
  elseif args.label ~= cjson.null then
    label = label_id(args, args.label, args.fold)
    if not label then return {outcome = 'labels_full'} end
    ids = {label}
  end
  for i, record in ipairs(records) do
    if record then
      local own = ids
      if label and #record.l == 1 and heir(args, record.l[1]) == label then own = nil end
      local split, used = args.split, args.used[i]
      if split == '' then split, used = record.s, record.u end
      if move(args, args.digests[i], record, own, split, used) then changed = changed + 1 end
    end
  end
  if changed > 0 then record_change(args, 'dataset', args.task) end
  return {outcome = 'done', number = changed, names = some(absent)}
end

-- digests. Return those whose files no dataset holds any more.
function datasets.remove(args)
  local refusal = find_change_refusal(args)
  if refusal then return refusal end
  local removed, orphans = remove_images(args, args.digests)
  if removed == 0 then return {outcome = 'no_image'} end
  record_change(args, 'dataset', args.task)
  return {outcome = 'done', number = removed, names = some(orphans)}
end

-- Give the images of one label another one, record by record.
local function relabel(args, id, target)
  for _, digest in ipairs(redis.call('ZRANGE', index_key(args.tenant, args.task, '*', id), 0, -1)) do
    local record = read_record(args, digest)
    move(args, digest, record, {target}, record.s, record.u)
  end
end

-- Add the members of a sorted set to another one, and delete it. The work is that of the smaller one.
local function add_all(from, to)
  if redis.call('ZCARD', from) > redis.call('ZCARD', to) then
    add_all(to, from)
    redis.call('RENAME', from, to)
    return
  end
  local members = redis.call('ZRANGE', from, 0, -1, 'WITHSCORES')
  for i = 1, #members, 2 do redis.call('ZADD', to, members[i + 1], members[i]) end
  redis.call('UNLINK', from)
end

-- old (its name), label and fold (the new one), max_labels. Rename a label, or merge it into a label that exists.
function datasets.rename_label(args)
  local refusal = find_change_refusal(args)
  if refusal then return refusal end
  local names, labels = key(args, 'names'), key(args, 'labels')
  local id = redis.call('HGET', names, args.old)
  if not id then return {outcome = 'no_label'} end
  if args.old == args.label then return {outcome = 'done', created = false} end
  local target = redis.call('HGET', names, args.label)
  if not target then
    redis.call('HDEL', names, args.old)
    redis.call('HSET', names, args.label, id)
    redis.call('HSET', labels, id, args.label)
    drop_fold(args, id)
    put_fold(args, id, args.fold)
  elseif redis.call('ZCARD', index_key(args.tenant, args.task, '*', id)) <= RELABELLED then
    relabel(args, id, target)
    drop_if_unused(args, id) -- a label without images
  else
    -- `merged` keeps the ids of such labels, since records may have them.
    if redis.call('HLEN', key(args, 'merged')) >= args.max_labels then return {outcome = 'labels_full'} end
    for _, used in ipairs({'*', 'train', 'test'}) do
      add_all(index_key(args.tenant, args.task, used, id), index_key(args.tenant, args.task, used, target))
    end
    redis.call('HSET', key(args, 'merged'), id, target)
    redis.call('HDEL', names, args.old)
    redis.call('HDEL', labels, id)
    drop_fold(args, id)
  end
  record_change(args, 'dataset', args.task)
  return {outcome = 'done', created = target and true or false}
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

-- ids (of labels; '': no label). Return the numbers of images that train and that test, for each label, and the
-- dataset's totals. A dataset may have thousands of labels: the caller asks for some of them at a time.
function datasets.describe(args)
  if redis.call('EXISTS', task_key(args.tenant, args.task)) == 0 then return ABSENT end
  local counts = {}
  for i, id in ipairs(args.ids) do
    counts[i] = {}
    for j, used in ipairs(USES) do
      counts[i][j] = redis.call('ZCARD', index_key(args.tenant, args.task, used, id))
    end
  end
  local totals = redis.call('HMGET', key(args, 'info'), 'images', 'bytes')
  local found = {counts = counts, images = tonumber(totals[1] or 0), bytes = tonumber(totals[2] or 0)}
  return {outcome = 'done', text = cjson.encode(found)}
end

-- count. Take images of deleted datasets off the list of files in use. Return those that no dataset holds any more, and
-- whether more are left.
function datasets.drain(args)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', STAGED, '-inf', math.floor(now_s()) - STAGED_S)) do
    drop_staged(name)
  end
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
