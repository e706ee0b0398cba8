-- Keys of a task's dataset, and the removal of a dataset. `hub/registry/datasets.py` lists the keys.

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

-- Remove one holder of a file: an image ('') or a snapshot ('s:'). Return whether no dataset holds the file any more.
local function release_file(kind, digest)
  local holders = 'karst:images'
  if kind == 's:' then holders = 'karst:snapshots' end
  if redis.call('HINCRBY', holders, digest, -1) > 0 then return false end
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
  for _, training in ipairs(redis.call('HVALS', dataset_key(tenant, task, 'trainings'))) do
    redis.call('HSET', images, 's:' .. cjson.decode(training).snapshot.digest, '')
  end
  if redis.call('EXISTS', images) == 1 then
    local dropped = 'karst:dropped:' .. string.format('%.0f', redis.call('INCR', 'karst:dropped-number'))
    redis.call('RENAME', images, dropped)
    redis.call('SADD', 'karst:dropped', dropped)
  end
  for _, name in ipairs({'info', 'names', 'labels', 'folds', 'merged', 'trainings', 'training-order', 'kept'}) do
    redis.call('UNLINK', dataset_key(tenant, task, name))
  end
  redis.call('SREM', 'karst:kept', tenant .. ':' .. task)
end
