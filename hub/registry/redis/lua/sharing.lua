-- Checks of a task's sharing.

-- Return a sharing (public or not, a list of names) as JSON text. cjson would write an empty list as {}.
local function sharing_text(public, names)
  local quoted = {}
  for i, name in ipairs(names) do quoted[i] = '"' .. name .. '"' end
  return '{"public":' .. tostring(public) .. ',"tenants":[' .. table.concat(quoted, ',') .. ']}'
end

-- Return the names of a sharing (JSON text) that no tenant has, and the names that a tenant has.
local function split_names(sharing)
  local absent, known = {}, {}
  for _, name in ipairs(cjson.decode(sharing).tenants) do
    local names = redis.call('HEXISTS', 'karst:tenants', name) == 1 and known or absent
    names[#names + 1] = name
  end
  return absent, known
end

-- Return why a tenant may not share a task like this, or nil. max_shares: names of all its tasks together. max_with_one:
-- its tasks that it shares with one tenant.
local function share_refusal(tenant, task, former, sharing, max_shares, max_with_one)
  local added = #cjson.decode(sharing).tenants - (former and #cjson.decode(former).tenants or 0)
  local shares = tonumber(redis.call('HGET', tenant_key(tenant, 'shares'), '') or 0)
  if added > 0 and shares + added > max_shares then return limit_reached('shares', max_shares) end
  for _, other in ipairs(cjson.decode(sharing).tenants) do
    local is_shared = redis.call('SISMEMBER', tenant_key(other, 'shared'), tenant .. ':' .. task) == 1
    local count = tonumber(redis.call('HGET', tenant_key(tenant, 'shares'), other) or 0)
    if not is_shared and count >= max_with_one then return limit_reached('shared_with_one', max_with_one) end
  end
  return nil
end
