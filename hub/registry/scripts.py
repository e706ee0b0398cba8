"""The changes of tasks and tenants in Redis, as Lua: each happens completely or not at all (`database` has the keys).

A task is one hash:

    v:N        JSON of version N
    d:DIGEST   N
    a:ALIAS    JSON {N: weight}: what the alias points at
    h:ALIAS    JSON [JSON {N: weight}, ...]: what it pointed at before, oldest first
    share      JSON of its `Sharing`
    n          how many versions it has
"""

from .connection import KEPT_EVENTS

KEPT_TARGETS = 20  # former targets of an alias

_TASK = """
local tenant, task, entry = ARGV[1], ARGV[2], ARGV[3]
local base = 'karst:t:' .. tenant
local key = base .. ':task:' .. task

local function said(more)
  local text = cjson.decode(entry)
  for name, value in pairs(more) do text['detail'][name] = value end
  return cjson.encode(text)
end

local function past(alias)
  return cjson.decode(redis.call('HGET', key, 'h:' .. alias) or '[]')
end

local function keep(alias, targets)
  if #targets == 0 then redis.call('HDEL', key, 'h:' .. alias)
  else redis.call('HSET', key, 'h:' .. alias, cjson.encode(targets)) end
end

local function point(alias, targets)
  local old = redis.call('HGET', key, 'a:' .. alias)
  if old and old ~= targets then
    local before = past(alias)
    before[#before + 1] = old
    while #before > KEPT do table.remove(before, 1) end
    keep(alias, before)
  end
  redis.call('HSET', key, 'a:' .. alias, targets)
end

local function let_go(version)
  local body = cjson.decode(version)
  if redis.call('HINCRBY', 'karst:digests', body['digest'], -1) <= 0 then
    redis.call('HDEL', 'karst:digests', body['digest'])
  end
  redis.call('DECRBY', base .. ':bytes', body['size_bytes'])
  return body['digest']
end

local function share_out(sharing, command)
  if not sharing then return end
  local body = cjson.decode(sharing)
  if body['public'] then redis.call(command, 'karst:public', tenant .. ':' .. task) end
  for _, other in ipairs(body['tenants']) do
    redis.call(command, 'karst:t:' .. other .. ':shared', tenant .. ':' .. task)
  end
end
""".replace("KEPT", str(KEPT_TARGETS))

MOST_ALIASES = 100  # of a task
_ALIASES = """
local function may_have(alias)
  if redis.call('HEXISTS', key, 'a:' .. alias) == 1 then return true end
  local others = redis.call('HLEN', key) - 2 * tonumber(redis.call('HGET', key, 'n') or 0)
  return others <= MOST  -- an alias and its history
end
""".replace("MOST", str(2 * MOST_ALIASES))

# ARGV: ..., digest, version JSON without its number, bytes, aliases...
_ROOM = """
if revoked(entry) then return {'key'} end
local digest, bytes = ARGV[4], tonumber(ARGV[6])
local info = redis.call('HGET', 'karst:tenants', tenant)
if not info then return {'tenant'} end
if redis.call('EXISTS', 'karst:gc:' .. digest) == 1 then return {'gc'} end
for i = 7, #ARGV do
  if not may_have(ARGV[i]) then return {'full'} end
end
local number = redis.call('HGET', key, 'd:' .. digest)
if not number then
  local limits = cjson.decode(info)['limits']
  if redis.call('EXISTS', key) == 0 and redis.call('SCARD', base .. ':tasks') >= limits['tasks'] then
    return {'limit', 'tasks', tostring(limits['tasks'])}
  end
  if tonumber(redis.call('HGET', key, 'n') or 0) >= limits['versions'] then
    return {'limit', 'versions', tostring(limits['versions'])}
  end
  if tonumber(redis.call('GET', base .. ':bytes') or 0) + bytes > limits['stored_bytes'] then
    return {'limit', 'stored_bytes', string.format('%.0f', limits['stored_bytes'])}
  end
end
"""

# Replies: {'room'}, or {what stands against it, ...}
ROOM = _TASK + _ALIASES + _ROOM + "return {'room'}"

# Replies: {number, created, version JSON}, or {what stands against it, ...}
REGISTER = (
    _TASK
    + _ALIASES
    + _ROOM
    + """
local created = 0
if not number then
  created = 1
  number = string.format('%.0f', redis.call('HINCRBY', base .. ':numbers', task, 1))
  redis.call('SADD', base .. ':tasks', task)
  redis.call('HSET', key, 'd:' .. digest, number, 'v:' .. number, ARGV[5])
  redis.call('HINCRBY', key, 'n', 1)
  redis.call('INCRBY', base .. ':bytes', bytes)
  redis.call('HINCRBY', 'karst:digests', digest, 1)
end
for i = 7, #ARGV do point(ARGV[i], '{"' .. number .. '":1}') end
changed(tenant, 'task', task, said({version = tonumber(number)}))
return {tonumber(number), created, redis.call('HGET', key, 'v:' .. number)}
"""
)

# ARGV: ..., alias, JSON {number: weight}, numbers...  Replies: {'absent'}, {'version', number} or {'done'}
SET_ALIAS = (
    _TASK
    + _ALIASES
    + """
if revoked(entry) then return {'key'} end
if redis.call('EXISTS', key) == 0 then return {'absent'} end
if not may_have(ARGV[4]) then return {'full'} end
for i = 6, #ARGV do
  if redis.call('HEXISTS', key, 'v:' .. ARGV[i]) == 0 then return {'version', ARGV[i]} end
end
point(ARGV[4], ARGV[5])
changed(tenant, 'task', task, entry)
return {'done'}
"""
)

# ARGV: ..., alias. Goes to the last target whose versions are all there still, and drops it from the history.
ROLL_BACK = (
    _TASK
    + """
if revoked(entry) then return {'key'} end
local alias = ARGV[4]
local now = redis.call('HGET', key, 'a:' .. alias)
if not now then return {'absent'} end
local before = past(alias)
while #before > 0 do
  local targets = table.remove(before)
  local whole = targets ~= now
  for number in pairs(cjson.decode(targets)) do
    whole = whole and redis.call('HEXISTS', key, 'v:' .. number) == 1
  end
  if whole then
    redis.call('HSET', key, 'a:' .. alias, targets)
    keep(alias, before)
    changed(tenant, 'task', task, said({targets = cjson.decode(targets)}))
    return {'done'}
  end
end
return {'nothing'}
"""
)

# ARGV: ..., alias
DELETE_ALIAS = (
    _TASK
    + """
if revoked(entry) then return {'key'} end
if redis.call('HDEL', key, 'a:' .. ARGV[4]) == 0 then return {'absent'} end
redis.call('HDEL', key, 'h:' .. ARGV[4])
changed(tenant, 'task', task, entry)
return {'done'}
"""
)

# ARGV: ..., JSON of a `Sharing`
SHARE = (
    _TASK
    + """
if revoked(entry) then return {'key'} end
if redis.call('EXISTS', key) == 0 then return {'absent'} end
share_out(redis.call('HGET', key, 'share'), 'SREM')
share_out(ARGV[4], 'SADD')
redis.call('HSET', key, 'share', ARGV[4])
changed(tenant, 'task', task, entry)
return {'done'}
"""
)

# For DELETE_TENANT too, which has an entry of its own.
_DROP_TASK = """
local function drop()
  local fields = redis.call('HGETALL', key)
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'v:' then let_go(fields[i + 1]) end
  end
  share_out(redis.call('HGET', key, 'share'), 'SREM')
  redis.call('SREM', base .. ':tasks', task)
  return redis.call('DEL', key)
end
"""

DELETE_TASK = (
    _TASK
    + _DROP_TASK
    + """
if revoked(entry) then return {'key'} end
if drop() == 0 then return {'absent'} end
changed(tenant, 'task', task, entry)
return {'done'}
"""
)

# ARGV: ..., number. Replies: {'absent'}, {'alias', its name} or {'done'}
DELETE_VERSION = (
    _TASK
    + """
if revoked(entry) then return {'key'} end
local version = redis.call('HGET', key, 'v:' .. ARGV[4])
if not version then return {'absent'} end
local fields = redis.call('HGETALL', key)
for i = 1, #fields, 2 do
  if string.sub(fields[i], 1, 2) == 'a:' and cjson.decode(fields[i + 1])[ARGV[4]] then
    return {'alias', string.sub(fields[i], 3)}
  end
end
redis.call('HDEL', key, 'v:' .. ARGV[4], 'd:' .. let_go(version))
redis.call('HINCRBY', key, 'n', -1)
changed(tenant, 'task', task, entry)
return {'done'}
"""
)

# ARGV: tenant, entry. Every task, key and number of a tenant; its name is free again.
DELETE_TENANT = """
if revoked(ARGV[2]) then return {'key'} end
if redis.call('HDEL', 'karst:tenants', ARGV[1]) == 0 then return {'absent'} end
local whole = ARGV[2]
for _, name in ipairs(redis.call('SMEMBERS', 'karst:t:' .. ARGV[1] .. ':tasks')) do
  ARGV[2], ARGV[3] = name, whole
  DROP
  drop()
end
local base = 'karst:t:' .. ARGV[1]
-- What others share with this name they do not share with the next one of this name.
for _, name in ipairs(redis.call('SMEMBERS', base .. ':shared')) do
  local owner, shared = string.match(name, '^([^:]+):(.+)$')
  local at = 'karst:t:' .. owner .. ':task:' .. shared
  local sharing = redis.call('HGET', at, 'share')
  if sharing then
    local body, left = cjson.decode(sharing), {}
    for _, other in ipairs(body['tenants']) do
      if other ~= ARGV[1] then left[#left + 1] = '"' .. other .. '"' end
    end
    -- By hand: cjson writes an empty list as {}.
    local text = '{"public":' .. tostring(body['public']) .. ',"tenants":[' .. table.concat(left, ',') .. ']}'
    redis.call('HSET', at, 'share', text)
    redis.call('XADD', 'karst:events', 'MAXLEN', '~', EVENTS, '*', 'tenant', owner, 'kind', 'task', 'name', shared)
  end
end
for _, id in ipairs(redis.call('SMEMBERS', base .. ':keys')) do
  redis.call('HDEL', 'karst:keys', id)
  redis.call('HDEL', 'karst:used', id)
end
for _, rest in ipairs({'tasks', 'numbers', 'bytes', 'keys', 'shared', 'audit', 'rate', 'flight', 'settled',
  'counts'}) do
  redis.call('DEL', base .. ':' .. rest)
end
redis.call('ZREM', 'karst:active', ARGV[1])
changed('', 'tenant', ARGV[1], whole)
return {'done'}
""".replace("DROP", _TASK + _DROP_TASK).replace("EVENTS", str(KEPT_EVENTS))

# ARGV: tenant, entry, JSON [{name, last, fields: the task's hash, held: [{digest, bytes}], share}, ...]
# Replies: {'done'}, or what stands against it: {'there', names...}, {'limit', which, how much}, {'gc'}, {'tenant'}
RESTORE = """
if revoked(ARGV[2]) then return {'key'} end
local info = redis.call('HGET', 'karst:tenants', ARGV[1])
if not info then return {'tenant'} end
local limits = cjson.decode(info)['limits']
local whole, tasks, there, bytes = ARGV[2], cjson.decode(ARGV[3]), {'there'}, 0
local held_by = 'karst:t:' .. ARGV[1]
for _, one in ipairs(tasks) do
  if redis.call('EXISTS', held_by .. ':task:' .. one['name']) == 1 then there[#there + 1] = one['name'] end
  if #one['held'] > limits['versions'] then return {'limit', 'versions', tostring(limits['versions'])} end
  for _, version in ipairs(one['held']) do
    if redis.call('EXISTS', 'karst:gc:' .. version['digest']) == 1 then return {'gc'} end
    bytes = bytes + version['bytes']
  end
end
if #there > 1 then return there end
if redis.call('SCARD', held_by .. ':tasks') + #tasks > limits['tasks'] then
  return {'limit', 'tasks', tostring(limits['tasks'])}
end
if tonumber(redis.call('GET', held_by .. ':bytes') or 0) + bytes > limits['stored_bytes'] then
  return {'limit', 'stored_bytes', string.format('%.0f', limits['stored_bytes'])}
end
for _, one in ipairs(tasks) do
  ARGV[2], ARGV[3] = one['name'], whole
  TASK
  for name, value in pairs(one['fields']) do redis.call('HSET', key, name, value) end
  share_out(one['share'], 'SADD')
  redis.call('SADD', base .. ':tasks', task)
  local last = math.max(one['last'], tonumber(redis.call('HGET', base .. ':numbers', task) or 0))
  redis.call('HSET', base .. ':numbers', task, last)
  for _, version in ipairs(one['held']) do redis.call('HINCRBY', 'karst:digests', version['digest'], 1) end
end
redis.call('INCRBY', held_by .. ':bytes', bytes)
changed(ARGV[1], 'tenant', ARGV[1], whole)
return {'done'}
""".replace("TASK", _TASK)
