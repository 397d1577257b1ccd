"""The scripts of the ledger of lent memory, in Redis' Lua.

Each takes the keys of `adakv_serve.router.lending.redis_leases.LendingKeys`, in their order, and
first removes expired entries.
"""

# Far longer than any offer or lease: for applications that are gone.
_IDLE_MS = 3_600_000
_BEGIN = """
local offers, leases, offer_ends, lease_ends = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local lent, rooms = KEYS[5], {blocks = KEYS[6], host_bytes = KEYS[7]}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Brings a lender's room up to date.
local function rank(lender)
    local text = redis.call('HGET', offers, lender)
    local offer = text and cjson.decode(text)
    for resource, room in pairs(rooms) do
        if offer then
            local sum = tonumber(redis.call('HGET', lent, resource .. ':' .. lender) or '0')
            redis.call('ZADD', room, math.max(0, (offer[resource] or 0) - sum), lender)
        else
            redis.call('ZREM', room, lender)
        end
    end
end

local function remove_offer(lender)
    redis.call('HDEL', offers, lender)
    redis.call('ZREM', offer_ends, lender)
    rank(lender)
end

local function add_lent(lease, sign)
    local name = lease.resource .. ':' .. lease.lender
    local change = string.format('%.0f', sign * lease.amount)
    if redis.call('HINCRBY', lent, name, change) <= 0 then redis.call('HDEL', lent, name) end
    rank(lease.lender)
end

local function remove_lease(id)
    local text = redis.call('HGET', leases, id)
    redis.call('ZREM', lease_ends, id)
    if not text then return 0 end
    redis.call('HDEL', leases, id)
    add_lent(cjson.decode(text), -1)
    return 1
end

local function is_whole()
    local offered, leased = redis.call('HLEN', offers), redis.call('HLEN', leases)
    for _, key in ipairs({offer_ends, rooms.blocks, rooms.host_bytes}) do
        if redis.call('ZCARD', key) ~= offered then return false end
    end
    if redis.call('ZCARD', lease_ends) ~= leased then return false end
    return (redis.call('HLEN', lent) > 0) == (leased > 0)
end

local function remove_ended()
    for _, lender in ipairs(redis.call('ZRANGEBYSCORE', offer_ends, '-inf', now)) do
        remove_offer(lender)
    end
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', lease_ends, '-inf', now)) do
        remove_lease(id)
    end
end

-- Unreadable entries and keys of other types raise errors, for ever if they stayed.
local is_readable, is_kept = pcall(function()
    if not is_whole() then return false end
    remove_ended()
    return true
end)
if not (is_readable and is_kept) then redis.call('DEL', unpack(KEYS)) end

local function answer()
"""
_END = f"""
end
local answered = answer()
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, {_IDLE_MS}) end
return answered
"""


def _whole(body: str) -> str:
    return _BEGIN + body + _END


OFFER = _whole("""
redis.call('HSET', offers, ARGV[1], ARGV[2])
redis.call('ZADD', offer_ends, now + ARGV[3], ARGV[1])
rank(ARGV[1])
""")
WITHDRAW = _whole("""
remove_offer(ARGV[1])
""")
TAKE = _whole("""
local id, wanted, ttl = ARGV[1], cjson.decode(ARGV[2]), ARGV[3]
if redis.call('HEXISTS', leases, id) == 1 then return 1 end
local room = redis.call('ZSCORE', rooms[wanted.resource], wanted.lender)
if not room or tonumber(room) < wanted.amount then return 0 end
redis.call('HSET', leases, id, ARGV[2])
redis.call('ZADD', lease_ends, now + ttl, id)
add_lent(wanted, 1)
return 1
""")
RENEW = _whole("""
local text = redis.call('HGET', leases, ARGV[1])
if not text or redis.call('HEXISTS', offers, cjson.decode(text).lender) == 0 then return 0 end
redis.call('ZADD', lease_ends, now + ARGV[2], ARGV[1])
return 1
""")
GIVE_BACK = _whole("""
return remove_lease(ARGV[1])
""")
BEST = _whole("""
local count, kind = tonumber(ARGV[1]), ARGV[2]
local best, seen = {}, {}

local function reads_kind(lender)
    local is_readable, offer = pcall(cjson.decode, redis.call('HGET', offers, lender))
    return is_readable and type(offer) == 'table' and (offer.cache_kind or '') == kind
end

local function add(lender)
    if seen[lender] then return end
    seen[lender] = true
    local blocks = redis.call('ZSCORE', rooms.blocks, lender)
    local host_bytes = redis.call('ZSCORE', rooms.host_bytes, lender)
    table.insert(best, {lender, blocks, host_bytes})
end

for _, key in pairs(rooms) do
    local found, first = 0, 0
    repeat
        local lenders = redis.call('ZREVRANGE', key, first, first + count - 1)
        for _, lender in ipairs(lenders) do
            if found < count and reads_kind(lender) then
                found = found + 1
                add(lender)
            end
        end
        first = first + count
    until found == count or #lenders < count
end
return best
""")
READ = _whole("""
return {redis.call('HGETALL', offers), redis.call('HGETALL', leases)}
""")
ALL = (OFFER, WITHDRAW, TAKE, RENEW, GIVE_BACK, BEST, READ)
