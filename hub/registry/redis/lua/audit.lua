-- Audit entries of the hub that belong to no change of the registry.

local audit = {}

function audit.append(args)
  append_audit(args)
  return DONE
end

return cjson.encode(audit[ARGV[1]](cjson.decode(ARGV[2])))
