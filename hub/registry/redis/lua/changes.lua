-- Helpers of every script that changes the registry: revocation check, change events, audit entries.

local MAX_EVENTS = 100000 -- kept change events
local MAX_AUDIT_ENTRIES = 100000 -- kept audit entries per stream

local DONE = {outcome = 'done'}
local REVOKED = {outcome = 'revoked'}
local ABSENT = {outcome = 'absent'}

local function tenant_key(tenant, name)
  return 'karst:t:' .. tenant .. ':' .. name
end

-- Return whether the caller's key was revoked while its request was in flight.
local function is_revoked(entry)
  local key = cjson.decode(entry).key
  return key ~= '' and redis.call('HEXISTS', 'karst:keys', key) == 0
end

local function publish(tenant, kind, name)
  redis.call('XADD', 'karst:events', 'MAXLEN', '~', MAX_EVENTS, '*', 'tenant', tenant, 'kind', kind, 'name', name)
end

-- Append an entry (JSON text) to the audit of the hub, of admins and of the tenant ('': the hub itself).
local function append_audit(tenant, entry)
  local streams = {'karst:audit'}
  if cjson.decode(entry).role == 'admin' then streams[#streams + 1] = 'karst:audit:admins' end
  if tenant ~= '' then streams[#streams + 1] = tenant_key(tenant, 'audit') end
  for _, stream in ipairs(streams) do
    redis.call('XADD', stream, 'MAXLEN', '~', MAX_AUDIT_ENTRIES, '*', 'tenant', tenant, 'entry', entry)
  end
end

local function record_change(tenant, kind, name, entry)
  publish(tenant, kind, name)
  append_audit(tenant, entry)
end
