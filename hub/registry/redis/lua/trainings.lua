-- Trainings of tasks. Every function takes tenant, task and id, except `take`. `body` is the training's JSON text.

local trainings = {}

local function key(args, name)
  return dataset_key(args.tenant, args.task, name)
end

-- Return the training's text if it may be changed by the holder of a token; token '': if its lease has expired.
local function held(args)
  local job = job_name(args.tenant, args.task, args.id)
  local token = redis.call('HGET', JOBS, job)
  if not token or token == '' then return false end
  if args.token ~= '' then return token == args.token end
  return tonumber(redis.call('ZSCORE', LEASES, job) or 0) <= now_s()
end

-- Return the head of the training in `body`.
local function new_head(args)
  return head_of(cjson.decode(args.body), #args.body)
end

-- Return whether a training is a job that has not ended, or made a version that the task still has. Such a version's
-- metrics name the training and its snapshot.
local function is_needed(args, head)
  if redis.call('HEXISTS', JOBS, job_name(args.tenant, args.task, head.id)) == 1 then return true end
  if not head.version then return false end
  local field = 'v:' .. string.format('%.0f', head.version)
  return redis.call('HEXISTS', task_key(args.tenant, args.task), field) == 1
end

-- Write a training's text and head, count its bytes, and hold the report that it names in place of that of its former
-- text. So a training that is dropped releases what it holds, and no other training's report. Return a refusal if the
-- report's file is being removed, and whether the training is new.
local function store(args, head)
  local former = training_head(args.tenant, args.task, args.id) or {}
  local report, held_report = head.report, former.report
  if report ~= held_report then
    if report and redis.call('EXISTS', 'karst:image-gc:' .. report) == 1 then return {outcome = 'removing'} end
    if report then redis.call('HINCRBY', HOLDERS['r:'], report, 1) end
    if held_report then release_file('r:', held_report) end -- a collection removes the file
  end
  return nil, write_training(args.tenant, args.task, head, args.body)
end

-- Return the heads of the ended trainings that a new one replaces, unless they are needed: those older than the newest
-- max_trainings, and the oldest ones as long as the tenant's trainings have more than max_bytes, or its texts more than
-- max_registry_bytes. Also return the bytes over both limits that remain.
local function outdated(args, head)
  local found, order = {}, key(args, 'training-order')
  local files = tonumber(redis.call('GET', tenant_key(args.tenant, 'training_bytes')) or 0)
  local over = files + head.file_bytes - args.max_bytes
  local over_texts = text_bytes(args.tenant) + head.text_bytes - args.max_registry_bytes
  local excess = redis.call('ZCARD', order) + 1 - args.max_trainings
  if excess <= 0 and over <= 0 and over_texts <= 0 then return found, over, over_texts end
  for place, id in ipairs(redis.call('ZRANGE', order, 0, -1)) do
    if place > excess and over <= 0 and over_texts <= 0 then break end
    local old = training_head(args.tenant, args.task, id)
    if not is_needed(args, old) then
      found[#found + 1], over, over_texts = old, over - old.file_bytes, over_texts - old.text_bytes
    end
  end
  return found, over, over_texts
end

-- Forget these trainings. Return their files that no other training uses.
local function forget(args, found)
  local orphans = {}
  for _, head in ipairs(found) do
    redis.call('HDEL', key(args, 'trainings'), head.id)
    redis.call('HDEL', key(args, 'training-heads'), head.id)
    redis.call('ZREM', key(args, 'training-order'), head.id)
    count_training_bytes(args.tenant, -head.file_bytes)
    count_text_bytes(args.tenant, -head.text_bytes)
    if release_file('s:', head.snapshot) then orphans[#orphans + 1] = 's:' .. head.snapshot end
    if head.report and release_file('r:', head.report) then orphans[#orphans + 1] = 'r:' .. head.report end
  end
  return orphans
end

-- Add a job to its tenant's queue. Of the tenants with a queue, the one whose last job started first is next.
local function enqueue(args, place)
  local job = job_name(args.tenant, args.task, args.id)
  redis.call('HSET', JOBS, job, '')
  redis.call('ZREM', LEASES, job)
  redis.call('SADD', tenant_key(args.tenant, 'training-jobs'), job)
  redis.call('ZADD', tenant_key(args.tenant, 'training-queue'), place, job)
  redis.call('ZADD', TURNS, redis.call('GET', tenant_key(args.tenant, 'training-turn')) or 0, args.tenant)
end

-- Add a training to the last ended ones of the hub; the oldest beyond max_ended leave.
local function note_end(args)
  redis.call('ZADD', ENDED, string.format('%.6f', now_s()), job_name(args.tenant, args.task, args.id))
  redis.call('ZREMRANGEBYRANK', ENDED, 0, -args.max_ended - 1)
end

-- body, snapshot (digest), max_trainings, entry, audited (whether to write the entry), queued (whether to add a job),
-- max_jobs (queued or running ones of the tenant), max_bytes (of the tenant's snapshots and reports),
-- max_registry_bytes, max_ended, is_known (refuse a new training). Add a training, or replace its body, which is never
-- refused for its size. Return the files of the oldest trainings that were dropped and that no other training uses.
function trainings.put(args)
  if is_revoked(args.entry) then return REVOKED end
  local refusal = (args.queued or not args.audited) and take_change(args)
  if refusal then return refusal end
  if redis.call('EXISTS', task_key(args.tenant, args.task)) == 0 then return ABSENT end
  if redis.call('EXISTS', 'karst:image-gc:' .. args.snapshot) == 1 then return {outcome = 'removing'} end
  if args.queued and redis.call('SCARD', tenant_key(args.tenant, 'training-jobs')) >= args.max_jobs then
    return limit_reached('training_jobs', args.max_jobs)
  end
  local known = redis.call('HEXISTS', key(args, 'trainings'), args.id) == 1
  if args.is_known and not known then return ABSENT end -- its task was deleted, and made again
  local head, found, over, over_texts = new_head(args), {}, 0, 0
  if not known then found, over, over_texts = outdated(args, head) end
  if over > 0 then return limit_reached('training_bytes', args.max_bytes) end
  if over_texts > 0 then return limit_reached('registry_bytes', args.max_registry_bytes) end
  local removing, is_new = store(args, head)
  if removing then return removing end
  local orphans = {}
  if is_new then
    orphans = forget(args, found)
    redis.call('HINCRBY', 'karst:snapshots', args.snapshot, 1)
    redis.call('ZADD', key(args, 'training-order'), redis.call('HINCRBY', key(args, 'info'), 'last', 1), args.id)
    if args.queued then enqueue(args, redis.call('INCR', 'karst:training-number')) end
  end
  if args.audited then record_change(args, 'dataset', args.task) end
  if args.audited and not args.queued then note_end(args) end
  local names = nil
  if #orphans > 0 then names = orphans end
  return {outcome = 'done', names = names}
end

-- Return whether a job has its training. Forget one without: a Redis that lost keys may have such jobs.
local function exists(job)
  local tenant, task, id = string.match(job, '^([^:]+):([^:]+):([^:]+)$')
  if redis.call('HEXISTS', dataset_key(tenant, task, 'trainings'), id) == 1 then return true end
  drop_job(tenant, task, id)
  return false
end

-- token, lease_s, max_running. Give the next job to a gateway, unless enough are running. Return the job's name as text
-- ('' for none), and the names of the jobs whose leases have expired.
function trainings.take(args)
  local now = now_s()
  local reply, expired = {outcome = 'done', text = ''}, {}
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, 10)) do
    if exists(job) then expired[#expired + 1] = job end
  end
  if #expired > 0 then reply.names = expired end
  if redis.call('ZCARD', LEASES) >= args.max_running then return reply end
  local tenant = redis.call('ZRANGE', TURNS, 0, 0)[1]
  if not tenant then return reply end
  local queue = tenant_key(tenant, 'training-queue')
  local job = redis.call('ZPOPMIN', queue)[1]
  local turn = redis.call('INCR', 'karst:training-number')
  redis.call('SET', tenant_key(tenant, 'training-turn'), turn, 'EX', TURN_S)
  if redis.call('EXISTS', queue) == 1 then redis.call('ZADD', TURNS, turn, tenant)
  else redis.call('ZREM', TURNS, tenant) end
  if not job or not exists(job) then return reply end
  redis.call('HSET', JOBS, job, args.token)
  redis.call('ZADD', LEASES, now + args.lease_s, job)
  reply.text = job
  return reply
end

-- token, body, lease_s. Replace the body of a running job and renew its lease.
function trainings.write(args)
  if not held(args) then return ABSENT end
  redis.call('ZADD', LEASES, now_s() + args.lease_s, job_name(args.tenant, args.task, args.id))
  return store(args, new_head(args)) or DONE
end

-- token ('': its lease has expired), body. Return a running job to the front of its tenant's queue.
function trainings.requeue(args)
  if not held(args) then return ABSENT end
  local removing = store(args, new_head(args))
  if removing then return removing end
  enqueue(args, 0)
  return DONE
end

-- token ('': its lease has expired), body, entry, max_ended. End a running job.
function trainings.finish(args)
  if not held(args) then return ABSENT end
  local removing = store(args, new_head(args))
  if removing then return removing end
  drop_job(args.tenant, args.task, args.id)
  record_change(args, 'dataset', args.task)
  note_end(args)
  return DONE
end

-- body, entry, max_ended. End a job that is queued or runs and has made no version; one that made its version is about to
-- end. The gateway that runs the job kills its process.
function trainings.cancel(args)
  local refused = refusal_of(args)
  if refused then return refused end
  local job = job_name(args.tenant, args.task, args.id)
  if redis.call('HEXISTS', JOBS, job) == 0 or redis.call('HEXISTS', MADE, job) == 1 then return ABSENT end
  local removing = store(args, new_head(args))
  if removing then return removing end
  drop_job(args.tenant, args.task, args.id)
  record_change(args, 'dataset', args.task)
  note_end(args)
  return DONE
end

return cjson.encode(trainings[ARGV[1]](cjson.decode(ARGV[2])))
