-- Keys of a task's dataset, and the removal of a dataset. `hub/registry/datasets.py` lists the keys.

-- A job is named `tenant:task:id`. `karst:training-jobs` has the token of the gateway that runs it, '' while it is
-- queued. A job that no gateway's lease covers any more is free for any other gateway.

local JOBS, LEASES, TURNS = 'karst:training-jobs', 'karst:training-leases', 'karst:training-turns'
local MADE = 'karst:training-versions' -- job -> version that it has registered
local ENDED = 'karst:training-ended' -- the last ended trainings of the hub, by the time of their end
local TURN_S = 86400 -- for so long the registry remembers whose turn was last

local STAGED = 'karst:staged-datasets' -- `tenant:name` -> seconds since 1970 of the last change
local STAGED_S = 3600 -- then the gateway of the import has stopped

local function job_name(tenant, task, id)
  return tenant .. ':' .. task .. ':' .. id
end

-- Remove a training from the queue. Return whether it was queued or running.
local function drop_job(tenant, task, id)
  local job, queue = job_name(tenant, task, id), tenant_key(tenant, 'training-queue')
  if redis.call('HDEL', JOBS, job) == 0 then return false end
  redis.call('ZREM', LEASES, job)
  redis.call('HDEL', MADE, job)
  redis.call('SREM', tenant_key(tenant, 'training-jobs'), job)
  redis.call('ZREM', queue, job)
  if redis.call('EXISTS', queue) == 0 then redis.call('ZREM', TURNS, tenant) end
  return true
end

local function dataset_key(tenant, task, name)
  return tenant_key(tenant, 'data:' .. task .. ':' .. name)
end

-- Return the key of an index: images that are used as `used` ('train', 'test' or '*' for both), and have the label with
-- this id ('': no label; nil: any).
local function index_key(tenant, task, used, label)
  local suffix = ''
  if label then suffix = '=' .. label end
  return dataset_key(tenant, task, 'at:' .. used .. suffix)
end

-- Add to a tenant's numbers of images and of their bytes.
local function count_images(tenant, images, bytes)
  redis.call('INCRBY', tenant_key(tenant, 'images'), string.format('%.0f', images))
  redis.call('INCRBY', tenant_key(tenant, 'image_bytes'), string.format('%.0f', bytes))
end

-- Add to the bytes of a tenant's snapshots and reports.
local function count_training_bytes(tenant, bytes)
  if bytes ~= 0 then redis.call('INCRBY', tenant_key(tenant, 'training_bytes'), string.format('%.0f', bytes)) end
end

-- Return what the registry needs of a training. Its text may have 500 KB of figures: to decode those of many trainings
-- would block every other client of Redis.
local function head_of(training, text_bytes)
  local head = {id = training.id, snapshot = training.snapshot.digest, text_bytes = text_bytes}
  head.file_bytes = tonumber(training.file_bytes) or 0 -- of its snapshot and report; an older hub did not count them
  if training.report_digest ~= cjson.null then head.report = training.report_digest end
  if training.version ~= cjson.null then head.version = training.version end
  return head
end

-- Return the head of a training, or nil. One of an older hub has none, and its text is not counted.
local function training_head(tenant, task, id)
  local head = redis.call('HGET', dataset_key(tenant, task, 'training-heads'), id)
  if head then return cjson.decode(head) end
  local text = redis.call('HGET', dataset_key(tenant, task, 'trainings'), id)
  if text then return head_of(cjson.decode(text), 0) end
end

-- Return a tenant's bytes of tasks, versions and trainings.
local function text_bytes(tenant)
  return tonumber(redis.call('GET', tenant_key(tenant, 'registry')) or 0)
end

-- Add to a tenant's bytes of tasks, versions and trainings.
local function count_text_bytes(tenant, bytes)
  if bytes ~= 0 then redis.call('INCRBY', tenant_key(tenant, 'registry'), string.format('%.0f', bytes)) end
end

-- Write a training's text and its head, and count the bytes of its text and files. Return whether it is new.
local function write_training(tenant, task, head, text)
  local former = training_head(tenant, task, head.id) or {file_bytes = 0, text_bytes = 0}
  count_training_bytes(tenant, head.file_bytes - former.file_bytes)
  count_text_bytes(tenant, head.text_bytes - former.text_bytes)
  redis.call('HSET', dataset_key(tenant, task, 'training-heads'), head.id, cjson.encode(head))
  return redis.call('HSET', dataset_key(tenant, task, 'trainings'), head.id, text) == 1
end

local HOLDERS = {[''] = 'karst:images', ['s:'] = 'karst:snapshots', ['r:'] = 'karst:reports'}

-- Remove holders of a file (one by default): images (''), or trainings of a snapshot ('s:') or a report ('r:'). Return
-- whether nothing holds the file any more.
local function release_file(kind, digest, count)
  local holders = HOLDERS[kind]
  if redis.call('HINCRBY', holders, digest, -(count or 1)) > 0 then return false end
  redis.call('HDEL', holders, digest)
  redis.call('ZREM', 'karst:pending', digest)
  return true
end

-- Delete a dataset's index in one step of constant work per label. The hash of images moves to `karst:dropped`, from
-- which `datasets.drain` takes images in parts: a loop over 100,000 images would block every other client of Redis.
local function drop_dataset(tenant, task)
  local images = dataset_key(tenant, task, 'images')
  local totals = redis.call('HMGET', dataset_key(tenant, task, 'info'), 'images', 'bytes')
  if totals[1] then count_images(tenant, -tonumber(totals[1]), -tonumber(totals[2])) end
  local labels = redis.call('HKEYS', dataset_key(tenant, task, 'labels'))
  labels[#labels + 1] = ''
  for _, used in ipairs({'*', 'train', 'test'}) do
    redis.call('UNLINK', index_key(tenant, task, used))
    for _, label in ipairs(labels) do redis.call('UNLINK', index_key(tenant, task, used, label)) end
  end
  for _, id in ipairs(redis.call('HKEYS', dataset_key(tenant, task, 'trainings'))) do
    local head = training_head(tenant, task, id)
    drop_job(tenant, task, id)
    count_training_bytes(tenant, -head.file_bytes)
    count_text_bytes(tenant, -head.text_bytes)
    redis.call('ZREM', ENDED, job_name(tenant, task, id))
    redis.call('HINCRBY', images, 's:' .. head.snapshot, 1)
    if head.report then redis.call('HINCRBY', images, 'r:' .. head.report, 1) end
  end
  if redis.call('EXISTS', images) == 1 then
    local dropped = 'karst:dropped:' .. string.format('%.0f', redis.call('INCR', 'karst:dropped-number'))
    redis.call('RENAME', images, dropped)
    redis.call('SADD', 'karst:dropped', dropped)
  end
  local usage = redis.call('HGET', dataset_key(tenant, task, 'usage'), 'b')
  if usage then redis.call('DECRBY', tenant_key(tenant, 'usage_bytes'), usage) end
  for _, name in ipairs({'info', 'names', 'labels', 'folds', 'fold-of', 'merged', 'trainings', 'training-heads',
    'training-order', 'kept', 'usage'}) do
    redis.call('UNLINK', dataset_key(tenant, task, name))
  end
  redis.call('SREM', 'karst:kept', tenant .. ':' .. task)
end

-- Remove a staged dataset (`tenant:name`), unless it was adopted or removed.
local function drop_staged(name)
  if redis.call('ZREM', STAGED, name) == 1 then drop_dataset(string.match(name, '^([^:]*):(.*)$')) end
end

-- Remove all staged datasets of a tenant.
local function drop_all_staged(tenant)
  for _, name in ipairs(redis.call('ZRANGE', STAGED, 0, -1)) do
    if string.match(name, '^[^:]*') == tenant then drop_staged(name) end
  end
end

-- Return whether a staged dataset has all its images. It has lost them if the tenant was deleted meanwhile.
local function is_staged(tenant, name, images)
  if not redis.call('ZSCORE', STAGED, tenant .. ':' .. name) then return false end
  return tonumber(redis.call('HGET', dataset_key(tenant, name, 'info'), 'images') or 0) == images
end

-- Make a staged dataset the dataset of a task that is created in the same step.
local function adopt_dataset(tenant, staged, task)
  local names = {'images', 'info', 'names', 'folds', 'fold-of', 'merged', 'kept', 'trainings', 'training-heads', 'training-order'}
  local labels = redis.call('HKEYS', dataset_key(tenant, staged, 'labels'))
  names[#names + 1], labels[#labels + 1] = 'labels', ''
  for _, used in ipairs({'*', 'train', 'test'}) do
    names[#names + 1] = 'at:' .. used
    for _, label in ipairs(labels) do names[#names + 1] = 'at:' .. used .. '=' .. label end
  end
  for _, name in ipairs(names) do
    local from = dataset_key(tenant, staged, name)
    if redis.call('EXISTS', from) == 1 then redis.call('RENAME', from, dataset_key(tenant, task, name)) end
  end
  if redis.call('EXISTS', dataset_key(tenant, task, 'kept')) == 1 then
    redis.call('SADD', 'karst:kept', tenant .. ':' .. task)
  end
  redis.call('ZREM', STAGED, tenant .. ':' .. staged)
end
