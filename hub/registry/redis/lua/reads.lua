-- Reads of tasks. A task's hash may hold 50 MB of versions, so no function reads a hash whole, and each stops early: at
-- a number of bytes, or after MAX_SCANNED names of fields. The reply is a list of texts, not JSON.

local MAX_SCANNED = 3000
local ORDERS = {'name', 'labels', 'images', 'accuracy', 'version', 'registered'} -- of a tenant's own tasks

local reads = {}

-- Return the names of a hash's fields of these kinds (kind -> true), and the number of all its fields.
local function names_of(key, kinds)
  local found, all = {}, redis.call('HKEYS', key)
  for _, name in ipairs(all) do
    if kinds[string.match(name, '^(%l):') or name] then found[#found + 1] = name end
  end
  return found, #all
end

-- Append the name and the value of a hash's fields to a list. Return the bytes of the values.
local function append_fields(list, key, names)
  local bytes = 0
  for _, name in ipairs(names) do
    local value = redis.call('HGET', key, name)
    list[#list + 1] = name
    list[#list + 1] = value
    bytes = bytes + #value
  end
  return bytes
end

-- keys (of hashes), kinds (first letters of fields, or whole names). Return a list {name, value, ...} for each of the
-- first keys, at least one; it is empty for a task that does not exist.
function reads.describe(args)
  local kinds, replies, scanned = {}, {}, 0
  for _, kind in ipairs(args.kinds) do kinds[kind] = true end
  for _, key in ipairs(args.keys) do
    local reply = {}
    local names, count = names_of(key, kinds)
    append_fields(reply, key, names)
    replies[#replies + 1] = reply
    scanned = scanned + count
    if scanned >= MAX_SCANNED then break end
  end
  return replies
end

-- key, numbers, max_bytes. Return the text of each of the first numbers, at least one; '' for an absent version.
function reads.versions(args)
  local texts, bytes = {}, 0
  for _, number in ipairs(args.numbers) do
    local text = redis.call('HGET', args.key, 'v:' .. number) or ''
    bytes = bytes + #text
    if bytes > args.max_bytes and #texts > 0 then break end
    texts[#texts + 1] = text
  end
  return texts
end

-- Return the number of the newest version behind `latest`, as text; without that alias of the newest version.
local function current_number(key)
  local targets, largest = redis.call('HGET', key, 'a:latest'), 0
  if targets then
    for number in pairs(cjson.decode(targets)) do largest = math.max(largest, tonumber(number)) end
  else
    for _, name in ipairs(names_of(key, {v = true})) do
      largest = math.max(largest, tonumber(string.sub(name, 3)))
    end
  end
  return string.format('%.0f', largest)
end

-- Return the sorted members of a set that come after a name.
local function sorted_after(set, after)
  local found = {}
  for _, name in ipairs(redis.call('SMEMBERS', set)) do
    if name > after then found[#found + 1] = name end
  end
  table.sort(found)
  return found
end

-- Return the values by which a task is sorted. A task without a value comes before all others.
local function values_of(key)
  local number = current_number(key)
  local values = {name = 0, labels = 0, images = -1, accuracy = -1, version = tonumber(number), registered = 0}
  local summary = redis.call('HGET', key, 'i:' .. number)
  if not summary then return values end
  local body = cjson.decode(string.match(summary, '^%d+ (.*)$'))
  values.labels = body.classes
  if body.train_images and body.train_images ~= cjson.null then values.images = body.train_images end
  if body.accuracy and body.accuracy ~= cjson.null then values.accuracy = body.accuracy.accuracy end
  if body.registered and body.registered ~= cjson.null then
    -- Its digits from the year's last two to milliseconds: a double holds 15 of them exactly.
    local digits = string.gsub(string.sub(body.registered, 3, 23), '%D', '')
    values.registered = tonumber(string.sub(digits .. '00000000', 1, 15))
  end
  return values
end

-- tenant, count. Sort marked tasks again, at most `count`; all tasks where the sorted sets do not have them. Return the
-- number of tasks that are still marked.
function reads.sort(args)
  local function by(name) return tenant_key(args.tenant, 'by:' .. name) end
  local marked, all = tenant_key(args.tenant, 'unsorted'), tenant_key(args.tenant, 'tasks')
  if redis.call('EXISTS', marked) == 0 and redis.call('ZCARD', by('name')) ~= redis.call('SCARD', all) then
    for _, name in ipairs(ORDERS) do redis.call('UNLINK', by(name)) end
    redis.call('SUNIONSTORE', marked, all)
  end
  for _, task in ipairs(redis.call('SPOP', marked, args.count)) do
    local key = tenant_key(args.tenant, 'task:' .. task)
    local exists = redis.call('EXISTS', key) == 1
    for name, value in pairs(values_of(key)) do
      if exists then redis.call('ZADD', by(name), string.format('%.17g', value), task)
      else redis.call('ZREM', by(name), task) end
    end
  end
  return redis.call('SCARD', marked)
end

-- Return up to `count` names of the tenant's own tasks from a position of an order {by, descending}, whether further ones
-- exist, and the position of the first.
local function names_in_order(tenant, order, after, count)
  local first, command = tonumber(after) or 0, order.descending and 'ZREVRANGE' or 'ZRANGE'
  local names = redis.call(command, tenant_key(tenant, 'by:' .. order.by), first, first + count)
  return names, table.remove(names, count + 1) ~= nil, first
end

-- Return up to `count` names of a part of the tenant's list that come after a name, and whether further ones exist.
-- The parts are its own tasks (`own`), tasks shared with it by name (`named`), and other public tasks (`public`).
local function names_after(tenant, part, after, count)
  local found
  if part == 'public' then
    adopt_former_public()
    local start = after == '' and '-' or '(' .. after
    found = redis.call('ZRANGEBYLEX', PUBLIC, start, '+', 'LIMIT', 0, count + 1)
  else
    found = sorted_after(tenant_key(tenant, part == 'own' and 'tasks' or 'shared'), after)
  end
  local names = {}
  for i = 1, math.min(count, #found) do names[i] = found[i] end
  return names, #found > count
end

-- tenant, part, after (a name; '' for the first), count, max_bytes, order (absent: by name). Positions of the own tasks in
-- an order are numbers in place of names.
-- Return {position, entry, ...}: position is the last name of this page, or '' at the end of the part. An entry is
-- {name, number of the current version, its summary or '', its text or '' where it has a summary, alias, targets, ...}.
function reads.list(args)
  local names, has_more, first
  if args.order and args.part == 'own' then
    names, has_more, first = names_in_order(args.tenant, args.order, args.after, args.count)
  else
    names, has_more = names_after(args.tenant, args.part, args.after, args.count)
  end
  local reply, bytes, scanned = {''}, 0, 0
  for i, name in ipairs(names) do
    local owner, task = args.tenant, name
    if args.part ~= 'own' then owner, task = string.match(name, '^([^:]+):(.+)$') end
    local key = tenant_key(owner, 'task:' .. task)
    -- A tenant's own tasks and those shared by name are in other parts.
    local is_listed = args.part ~= 'public'
      or (owner ~= args.tenant and redis.call('SISMEMBER', tenant_key(args.tenant, 'shared'), name) == 0)
    local aliases, count = names_of(key, {a = true})
    if is_listed and count > 0 then
      local number = current_number(key)
      local summary = redis.call('HGET', key, 'i:' .. number) or ''
      local text = summary == '' and redis.call('HGET', key, 'v:' .. number) or ''
      local entry = {name, number, summary, text}
      bytes = bytes + #summary + #text + append_fields(entry, key, aliases)
      reply[#reply + 1] = entry
    end
    scanned = scanned + count + 1
    local position = first and string.format('%.0f', first + i) or name
    if i == #names then
      if has_more then reply[1] = position end
    elseif bytes > args.max_bytes or scanned > MAX_SCANNED then
      reply[1] = position
      break
    end
  end
  return reply
end

return reads[ARGV[1]](cjson.decode(ARGV[2]))
