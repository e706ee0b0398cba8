-- Changes of tasks, versions and aliases. Every function takes tenant, task and entry (the audit entry's JSON text).

local tasks = {}

-- Return the audit entry with more details.
local function with_details(entry, details)
  local body = cjson.decode(entry)
  for name, value in pairs(details) do body.detail[name] = value end
  return cjson.encode(body)
end

local function read_history(key, alias)
  return cjson.decode(redis.call('HGET', key, 'h:' .. alias) or '[]')
end

local function write_history(key, alias, history)
  if #history == 0 then
    redis.call('HDEL', key, 'h:' .. alias)
  else
    redis.call('HSET', key, 'h:' .. alias, cjson.encode(history))
  end
end

-- Move an alias to targets (JSON text) and append its former targets to its history.
local function move_alias(key, alias, targets, max_history)
  local former = redis.call('HGET', key, 'a:' .. alias)
  if former and former ~= targets then
    local history = read_history(key, alias)
    history[#history + 1] = former
    while #history > max_history do table.remove(history, 1) end
    write_history(key, alias, history)
  end
  redis.call('HSET', key, 'a:' .. alias, targets)
end

-- Count the bytes of a task that was changed, and record the change.
local function record_task_change(args, key)
  count_registry_bytes(args.tenant, key)
  record_change(args, 'task', args.task)
  return DONE
end

-- Write settings: name -> JSON text. The task keeps its other settings.
local function write_settings(key, settings)
  for name, text in pairs(settings) do redis.call('HSET', key, 's:' .. name, text) end
end

-- Return the aliases of a task, name -> targets (JSON text), and their number without `latest`.
local function read_aliases(key)
  local aliases, count = {}, 0
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local alias = string.match(field, '^a:(.+)$')
    if alias then aliases[alias] = redis.call('HGET', key, field) end
    if alias and alias ~= 'latest' then count = count + 1 end
  end
  return aliases, count
end

-- Return whether the task may have one more alias, or has this one already.
local function has_room_for_alias(key, alias, max_aliases)
  if alias == 'latest' or redis.call('HEXISTS', key, 'a:' .. alias) == 1 then return true end
  local _, count = read_aliases(key)
  return count < max_aliases
end

-- Return the reason why a version cannot be registered, or nil.
local function find_refusal(args)
  if is_revoked(args.entry) then return REVOKED end
  local info = redis.call('HGET', 'karst:tenants', args.tenant)
  if not info then return {outcome = 'no_tenant'} end
  if is_being_removed(args.digest) then return {outcome = 'removing'} end
  local key = task_key(args.tenant, args.task)
  for _, alias in ipairs(args.aliases) do
    if not has_room_for_alias(key, alias, args.max_aliases) then return {outcome = 'aliases_full'} end
  end
  if redis.call('HEXISTS', key, 'd:' .. args.digest) == 1 then return nil end
  local limits = cjson.decode(info).limits
  if redis.call('EXISTS', key) == 0 and redis.call('SCARD', tenant_key(args.tenant, 'tasks')) >= limits.tasks then
    return limit_reached('tasks', limits.tasks)
  end
  if tonumber(redis.call('HGET', key, 'n') or 0) >= limits.versions then
    return limit_reached('versions', limits.versions)
  end
  if used_bytes(args.tenant, args.digest) + args.size_bytes > limits.stored_bytes then
    return limit_reached('stored_bytes', limits.stored_bytes)
  end
  if redis.call('HLEN', tenant_key(args.tenant, 'orphans')) > args.max_orphans then
    return limit_reached('deleted_files', args.max_orphans)
  end
  return registry_refusal(args.tenant, args.version_bytes, args.max_registry_bytes)
end

-- digest, size_bytes, aliases, max_aliases, version_bytes (of the version's JSON), max_registry_bytes, max_orphans,
-- reserve_s (0: change nothing; otherwise count the bytes of a new file against the tenant from now on, and let no
-- collection remove the file for so long).
function tasks.check_quota(args)
  local refusal = find_refusal(args)
  if refusal then return refusal end
  if args.reserve_s > 0 and redis.call('HEXISTS', 'karst:digests', args.digest) == 0 then
    add_orphan(args.tenant, args.digest, args.size_bytes, args.reserve_s)
  end
  return {outcome = 'done', created = redis.call('HEXISTS', task_key(args.tenant, args.task), 'd:' .. args.digest) == 0}
end

-- Also: summary (of the version, see `models`), max_history, settings (name -> JSON text), latest (targets of the alias
-- `latest` that the caller has compared labels with; '' for none; null: any). ARGV[3] is the version's JSON without its
-- number: it may be long, so no JSON text contains it. Known bytes move no alias. training ({job, token}, null: none):
-- the version is the result of a job, which another gateway may have taken over; or, with the token '', of a training
-- in a request, whose task may have been deleted, and made again.
function tasks.register(args)
  local training = args.training ~= cjson.null and args.training
  local job = training and training.token ~= '' and training.job
  if job and redis.call('HGET', JOBS, job) ~= training.token then return {outcome = 'ended'} end
  if training and not job then
    local id = string.match(training.job, '[^:]+$')
    if redis.call('HEXISTS', dataset_key(args.tenant, args.task, 'trainings'), id) == 0 then return {outcome = 'ended'} end
  end
  local refusal = find_refusal(args) or take_change(args)
  if refusal then return refusal end
  local key = task_key(args.tenant, args.task)
  local number = redis.call('HGET', key, 'd:' .. args.digest)
  local created = not number
  if created and args.latest ~= cjson.null and args.latest ~= (redis.call('HGET', key, 'a:latest') or '') then
    return {outcome = 'latest_moved'}
  end
  if created then
    number = next_number(args.tenant, args.task)
    redis.call('SADD', tenant_key(args.tenant, 'tasks'), args.task)
    redis.call('HSET', key, 'd:' .. args.digest, number, 'v:' .. number, ARGV[3], 'i:' .. number, args.summary)
    redis.call('HINCRBY', key, 'n', 1)
    redis.call('INCRBY', tenant_key(args.tenant, 'bytes'), args.size_bytes)
    redis.call('HINCRBY', 'karst:digests', args.digest, 1)
    remove_orphan(args.digest)
    for _, alias in ipairs(args.aliases) do
      move_alias(key, alias, '{"' .. number .. '":1}', args.max_history)
    end
  end
  if job then redis.call('HSET', MADE, job, number) end
  write_settings(key, args.settings)
  args.entry = with_details(args.entry, {version = tonumber(number)})
  record_task_change(args, key)
  return {outcome = 'done', number = number, created = created}
end

-- alias, targets (JSON text), numbers (of the targets' versions), max_aliases, max_history, max_registry_bytes.
function tasks.set_alias(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local key = task_key(args.tenant, args.task)
  if redis.call('EXISTS', key) == 0 then return ABSENT end
  if not has_room_for_alias(key, args.alias, args.max_aliases) then return {outcome = 'aliases_full'} end
  for _, number in ipairs(args.numbers) do
    if redis.call('HEXISTS', key, 'v:' .. number) == 0 then return {outcome = 'no_version', names = {number}} end
  end
  local refusal = registry_refusal(args.tenant, #args.targets, args.max_registry_bytes)
  if refusal then return refusal end
  move_alias(key, args.alias, args.targets, args.max_history)
  return record_task_change(args, key)
end

-- alias. Restore the last targets whose versions all exist and remove them from the history.
function tasks.roll_back(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local key = task_key(args.tenant, args.task)
  local current = redis.call('HGET', key, 'a:' .. args.alias)
  if not current then return ABSENT end
  local history = read_history(key, args.alias)
  while #history > 0 do
    local targets = table.remove(history)
    local usable = targets ~= current
    for number in pairs(cjson.decode(targets)) do
      usable = usable and redis.call('HEXISTS', key, 'v:' .. number) == 1
    end
    if usable then
      redis.call('HSET', key, 'a:' .. args.alias, targets)
      write_history(key, args.alias, history)
      args.entry = with_details(args.entry, {targets = cjson.decode(targets)})
      return record_task_change(args, key)
    end
  end
  return {outcome = 'no_history'}
end

-- alias.
function tasks.delete_alias(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local key = task_key(args.tenant, args.task)
  if redis.call('HDEL', key, 'a:' .. args.alias) == 0 then return ABSENT end
  redis.call('HDEL', key, 'h:' .. args.alias)
  return record_task_change(args, key)
end

-- sharing (JSON text), max_registry_bytes, max_shares, max_with_one. Sharing with fewer tenants is never refused.
function tasks.share(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local key = task_key(args.tenant, args.task)
  if redis.call('EXISTS', key) == 0 then return ABSENT end
  local former = redis.call('HGET', key, 'share')
  local absent = split_names(args.sharing)
  if #absent > 0 then
    take_further_changes(args, #absent - 1) -- a change for each name: otherwise a tenant could try names without end
    return {outcome = 'no_tenants', names = absent}
  end
  refused = share_refusal(args.tenant, args.task, former, args.sharing, args.max_shares, args.max_with_one)
  if refused then return refused end
  local added = #args.sharing - redis.call('HSTRLEN', key, 'share')
  local refusal = added > 0 and registry_refusal(args.tenant, added, args.max_registry_bytes)
  if refusal then return refusal end
  update_shared_lists(false, args.tenant, args.task, former)
  update_shared_lists(true, args.tenant, args.task, args.sharing)
  redis.call('HSET', key, 'share', args.sharing)
  return record_task_change(args, key)
end

-- settings (name -> JSON text), max_registry_bytes. Change settings of a task, or create it without a version.
function tasks.put(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local info = redis.call('HGET', 'karst:tenants', args.tenant)
  if not info then return {outcome = 'no_tenant'} end
  local added_bytes = 0
  for _, text in pairs(args.settings) do added_bytes = added_bytes + #text end
  refused = registry_refusal(args.tenant, added_bytes, args.max_registry_bytes)
  if refused then return refused end
  local key = task_key(args.tenant, args.task)
  local created = redis.call('EXISTS', key) == 0
  if created then
    local limits = cjson.decode(info).limits
    if redis.call('SCARD', tenant_key(args.tenant, 'tasks')) >= limits.tasks then
      return limit_reached('tasks', limits.tasks)
    end
    redis.call('SADD', tenant_key(args.tenant, 'tasks'), args.task)
    redis.call('HSET', key, 'n', 0)
  end
  write_settings(key, args.settings)
  args.entry = with_details(args.entry, {created = created})
  record_task_change(args, key)
  return {outcome = 'done', created = created}
end

function tasks.delete(args)
  local refused = refusal_of(args)
  if refused then return refused end
  if not drop_task(args.tenant, args.task) then return ABSENT end
  record_change(args, 'task', args.task)
  return DONE
end

-- number (text), digest.
function tasks.delete_version(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local key = task_key(args.tenant, args.task)
  if redis.call('HGET', key, 'd:' .. args.digest) ~= args.number then return ABSENT end
  for alias, targets in pairs(read_aliases(key)) do
    if cjson.decode(targets)[args.number] then return {outcome = 'alias_in_use', names = {alias}} end
  end
  release_version(args.tenant, key, args.number, args.digest)
  redis.call('HDEL', key, 'v:' .. args.number, 'i:' .. args.number, 'd:' .. args.digest)
  redis.call('HINCRBY', key, 'n', -1)
  return record_task_change(args, key)
end

-- summaries: number -> summary of a version whose text an older hub has written. Further calls change nothing.
function tasks.add_summaries(args)
  local key = task_key(args.tenant, args.task)
  for number, summary in pairs(args.summaries) do
    if redis.call('HEXISTS', key, 'v:' .. number) == 1 then redis.call('HSETNX', key, 'i:' .. number, summary) end
  end
  if redis.call('EXISTS', key) == 1 then count_registry_bytes(args.tenant, key) end
  mark_unsorted(args.tenant, args.task)
  return DONE
end

-- key (name of a hash), numbers, expiry_s; ARGV[3], ARGV[4], ... are the texts of numbers[1],
-- numbers[2], ... Store versions of a task that `restore` creates. An import that ends before leaves no trace.
function tasks.stage(args)
  for i, number in ipairs(args.numbers) do redis.call('HSET', args.key, 'v:' .. number, ARGV[2 + i]) end
  redis.call('EXPIRE', args.key, args.expiry_s)
  return DONE
end

-- tasks: a list of {name, last_number, staged (name of a hash with the versions' texts), fields (the other fields of the
-- task's hash), versions ({digest, size_bytes}...), sharing (JSON text), dataset ({staged, images}, if it has one)};
-- registry_bytes (of all), max_registry_bytes.
-- Restore all of them or none, without names in `sharing` that no tenant of this hub has.
function tasks.restore(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local info = redis.call('HGET', 'karst:tenants', args.tenant)
  if not info then return {outcome = 'no_tenant'} end
  local limits = cjson.decode(info).limits
  local tasks_key, bytes_key = tenant_key(args.tenant, 'tasks'), tenant_key(args.tenant, 'bytes')
  local existing, size_bytes, adopted, adopted_bytes = {}, 0, {}, 0
  for _, task in ipairs(args.tasks) do
    if redis.call('EXISTS', task_key(args.tenant, task.name)) == 1 then existing[#existing + 1] = task.name end
    if #task.versions > limits.versions then return limit_reached('versions', limits.versions) end
    for _, version in ipairs(task.versions) do
      if is_being_removed(version.digest) then return {outcome = 'removing'} end
      size_bytes = size_bytes + version.size_bytes
      local owner, orphan_bytes = find_orphan(version.digest)
      if owner == args.tenant and not adopted[version.digest] then
        adopted[version.digest], adopted_bytes = true, adopted_bytes + orphan_bytes
      end
    end
  end
  if #existing > 0 then return {outcome = 'exists', names = existing} end
  if redis.call('SCARD', tasks_key) + #args.tasks > limits.tasks then return limit_reached('tasks', limits.tasks) end
  if used_bytes(args.tenant, '') - adopted_bytes + size_bytes > limits.stored_bytes then
    return limit_reached('stored_bytes', limits.stored_bytes)
  end
  local refusal = registry_refusal(args.tenant, args.registry_bytes, args.max_registry_bytes)
  if refusal then return refusal end
  for _, task in ipairs(args.tasks) do
    if #task.versions > 0 and redis.call('EXISTS', task.staged) == 0 then return {outcome = 'unstaged'} end
    local dataset = task.dataset
    if dataset and not is_staged(args.tenant, dataset.staged, dataset.images) then return {outcome = 'unstaged'} end
  end
  local numbers_key = tenant_key(args.tenant, 'numbers')
  for _, task in ipairs(args.tasks) do
    local key = task_key(args.tenant, task.name)
    if #task.versions > 0 then
      redis.call('RENAME', task.staged, key)
      redis.call('PERSIST', key)
    end
    for name, value in pairs(task.fields) do redis.call('HSET', key, name, value) end
    local _, known = split_names(task.sharing)
    local sharing = sharing_text(cjson.decode(task.sharing).public, known)
    redis.call('HSET', key, 'share', sharing)
    count_registry_bytes(args.tenant, key)
    update_shared_lists(true, args.tenant, task.name, sharing)
    if task.dataset then adopt_dataset(args.tenant, task.dataset.staged, task.name) end
    redis.call('SADD', tasks_key, task.name)
    local last_number = math.max(task.last_number,
      tonumber(redis.call('HGET', numbers_key, task.name) or redis.call('GET', tenant_key(args.tenant, 'floor')) or 0))
    redis.call('HSET', numbers_key, task.name, last_number)
    for _, version in ipairs(task.versions) do
      redis.call('HINCRBY', 'karst:digests', version.digest, 1)
      remove_orphan(version.digest)
    end
  end
  redis.call('INCRBY', bytes_key, size_bytes)
  record_change(args, 'tenant', args.tenant)
  return DONE
end

-- digest, duration_s. No version may refer to the file until the claim expires.
function tasks.claim_orphan(args)
  if redis.call('HEXISTS', 'karst:digests', args.digest) == 1 or is_reserved(args.digest) then
    return {outcome = 'in_use'}
  end
  redis.call('SET', 'karst:gc:' .. args.digest, '1', 'EX', args.duration_s)
  return DONE
end

return cjson.encode(tasks[ARGV[1]](cjson.decode(ARGV[2])))
