#include "bench/harness/scenario.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 24;

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

// Reads the fields of one object and remembers which it was asked for, so that a field nobody reads
// is an error and not silence.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail(fmt::format("{} is {}, expected an object", where_, shown()));
  }

  const std::string& where() const { return where_; }

  const Json* find(const char* name) {
    known_.insert(name);
    const auto it = object_.find(name);
    return it == object_.end() ? nullptr : &*it;
  }

  const Json& at(const char* name) {
    const Json* value = find(name);
    if (value == nullptr) fail(fmt::format("{} has no \"{}\"", where_, name));
    return *value;
  }

  void integer(const char* name, std::int64_t low, std::int64_t high, std::int64_t& value) {
    const Json* json = find(name);
    if (json == nullptr) return;
    if (!json->is_number_integer() || *json < low || *json > high) {
      fail(fmt::format("{}: {} is {}, expected an integer from {} to {}", where_, name,
                       json->dump(), low, high));
    }
    value = json->get<std::int64_t>();
  }

  void boolean(const char* name, bool& value) {
    const Json* json = find(name);
    if (json == nullptr) return;
    if (!json->is_boolean()) {
      fail(fmt::format("{}: {} is {}, expected true or false", where_, name, json->dump()));
    }
    value = json->get<bool>();
  }

  // Too small for a float is refused, as it would be another number: 0.
  void number(const char* name, float& value) {
    const Json* json = find(name);
    if (json == nullptr) return;
    using Limits = std::numeric_limits<float>;
    const double given = json->is_number() ? json->get<double>() : -1.0;
    if (given != 0 && !(given >= Limits::min() && given <= Limits::max())) {
      fail(fmt::format("{}: {} is {}, expected 0 or a number from {} to {}", where_, name,
                       json->dump(), Limits::min(), Limits::max()));
    }
    value = static_cast<float>(given);
  }

  std::string text(const char* name, const std::string& otherwise) {
    const Json* json = find(name);
    if (json == nullptr) return otherwise;
    if (!json->is_string()) {
      fail(fmt::format("{}: {} is {}, expected a string", where_, name, json->dump()));
    }
    return json->get<std::string>();
  }

  void dtype(const char* name, DType& value) {
    const std::string named = text(name, std::string(to_string(value)));
    try {
      value = parse_dtype(named);
    } catch (const Error& error) {
      fail(fmt::format("{}: {}: {}", where_, name, error.what()));
    }
  }

  void layout(const char* name, KvCacheLayout& value) {
    const std::string named = text(name, std::string(to_string(value)));
    if (named != "NHD" && named != "HND") {
      fail(fmt::format("{}: {} is \"{}\", expected NHD or HND", where_, name, named));
    }
    value = named == "NHD" ? KvCacheLayout::kNHD : KvCacheLayout::kHND;
  }

  void all_read() const {
    for (const auto& item : object_.items()) {
      if (known_.count(item.key()) == 0) {
        fail(fmt::format("{} has \"{}\", expected one of {}", where_, item.key(),
                         fmt::join(known_, ", ")));
      }
    }
  }

 private:
  std::string shown() const { return object_.dump().substr(0, 60); }

  const Json& object_;
  std::string where_;
  std::set<std::string> known_;
};

void read_batch(const Json& batch, const std::string& where, Scenario& scenario) {
  if (!batch.is_array() || batch.empty()) {
    fail(fmt::format("{}: batch is {}, expected a list of groups of sequences", where,
                     batch.dump().substr(0, 60)));
  }
  for (std::size_t i = 0; i < batch.size(); ++i) {
    Fields group(batch[i], fmt::format("{}: batch[{}]", where, i));
    std::int64_t count = 1;
    Seq seq;
    bool ragged = false;
    group.at("query_len");
    group.at("seq_len");
    group.integer("count", 1, 4096, count);
    group.integer("query_len", 1, kMaxTokens, seq.query_len);
    group.integer("seq_len", 1, kMaxTokens, seq.seq_len);
    group.boolean("ragged", ragged);
    group.all_read();
    for (std::int64_t s = 0; s < count; ++s) {
      // Lengths that end in the middle of pages and tiles and that no two neighbours share.
      const std::int64_t shorter = ragged ? 37 * (s + 1) % 61 : 0;
      scenario.seqs.push_back({seq.query_len, seq.seq_len - shorter});
      if (scenario.seqs.back().seq_len < seq.query_len) {
        fail(fmt::format("{}: sequence {} has {} keys, expected at least its {} query rows",
                         group.where(), s, scenario.seqs.back().seq_len, seq.query_len));
      }
    }
  }
}

void read_layer(Fields& fields, Scenario& scenario) {
  std::int64_t window = scenario.window;
  fields.integer("num_heads", 1, 4096, scenario.num_heads);
  fields.integer("num_kv_heads", 1, 4096, scenario.num_kv_heads);
  fields.integer("head_size_qk", 8, 576, scenario.head_size_qk);
  fields.integer("head_size_v", 8, 576, scenario.head_size_v);
  fields.integer("block_size", 0, 4096, scenario.block_size);
  fields.integer("window", 0, std::numeric_limits<std::int32_t>::max(), window);
  fields.boolean("sinks", scenario.sinks);
  fields.number("soft_cap", scenario.soft_cap);
  fields.boolean("alibi", scenario.alibi);
  fields.layout("layout", scenario.layout);
  fields.dtype("dtype", scenario.dtype);
  scenario.kv_dtype = scenario.dtype;
  fields.dtype("kv_dtype", scenario.kv_dtype);
  scenario.backend = fields.text("backend", "");
  const std::string policy = fields.text("policy", "balanced");
  scenario.window = static_cast<std::int32_t>(window);
  if (policy != "balanced" && policy != "batch_invariant") {
    fail(fmt::format("{}: policy is \"{}\", expected balanced or batch_invariant", fields.where(),
                     policy));
  }
  scenario.policy =
      policy == "balanced" ? SchedulePolicy::kBalanced : SchedulePolicy::kBatchInvariant;
  if (scenario.num_heads % scenario.num_kv_heads != 0) {
    fail(fmt::format("{}: num_heads is {}, expected a multiple of num_kv_heads, {}", fields.where(),
                     scenario.num_heads, scenario.num_kv_heads));
  }
  if (scenario.head_size_qk % 8 != 0 || scenario.head_size_v % 8 != 0) {
    fail(fmt::format("{}: head sizes are {} and {}, expected multiples of 8", fields.where(),
                     scenario.head_size_qk, scenario.head_size_v));
  }
  if (scenario.dtype != DType::kF32 && scenario.dtype != DType::kF16 &&
      scenario.dtype != DType::kBF16) {
    fail(fmt::format("{}: dtype is {}, expected fp32, fp16 or bf16", fields.where(),
                     to_string(scenario.dtype)));
  }
}

Scenario read_scenario(const Json& object, const std::string& where) {
  Fields fields(object, where);
  Scenario scenario;
  fields.at("name");
  scenario.name = fields.text("name", "");
  if (scenario.name.empty()) fail(fmt::format("{} has an empty name", where));
  Fields named(object, fmt::format("{} (\"{}\")", where, scenario.name));
  named.find("name");
  if (const Json* tags = named.find("tags")) {
    const bool strings =
        tags->is_array() &&
        std::all_of(tags->begin(), tags->end(), [](const Json& tag) { return tag.is_string(); });
    if (!strings) {
      fail(fmt::format("{}: tags is {}, expected a list of strings", named.where(), tags->dump()));
    }
    scenario.tags = tags->get<std::vector<std::string>>();
  }
  read_layer(named, scenario);
  read_batch(named.at("batch"), named.where(), scenario);
  named.all_read();
  return scenario;
}

// Keys that some row of the sequence sees: all but those below the first row's window.
std::int64_t visible_keys(const Seq& seq, std::int64_t window) {
  const std::int64_t context = seq.seq_len - seq.query_len;
  const std::int64_t first = window > 0 ? std::max<std::int64_t>(context - window + 1, 0) : 0;
  return seq.seq_len - first;
}

double visible_pairs(const Seq& seq, std::int64_t window) {
  double pairs = 0;
  for (std::int64_t p = seq.seq_len - seq.query_len; p < seq.seq_len; ++p) {
    pairs += static_cast<double>(window > 0 ? std::min(p + 1, window) : p + 1);
  }
  return pairs;
}

}  // namespace

PlanKey Scenario::key() const {
  return {.num_heads = num_heads,
          .num_kv_heads = num_kv_heads,
          .head_size_qk = head_size_qk,
          .head_size_v = head_size_v,
          .query_dtype = dtype,
          .key_dtype = kv_dtype,
          .value_dtype = kv_dtype,
          .mask = {.window = window},
          .policy = policy};
}

std::int64_t Scenario::num_tokens() const {
  std::int64_t sum = 0;
  for (const Seq& seq : seqs) sum += seq.query_len;
  return sum;
}

std::int64_t Scenario::max_seq_len() const {
  std::int64_t most = 0;
  for (const Seq& seq : seqs) most = std::max(most, seq.seq_len);
  return most;
}

std::int64_t Scenario::context_tokens() const {
  std::int64_t sum = 0;
  for (const Seq& seq : seqs) sum += seq.seq_len - seq.query_len;
  return sum;
}

double Scenario::kv_bytes() const {
  std::int64_t keys = 0;
  for (const Seq& seq : seqs) keys += visible_keys(seq, window);
  return static_cast<double>(keys * num_kv_heads * (head_size_qk + head_size_v) *
                             size_of(kv_dtype));
}

double Scenario::bytes() const {
  return kv_bytes() + static_cast<double>(num_tokens() * num_heads * (head_size_qk + head_size_v) *
                                          size_of(dtype));
}

double Scenario::output_bytes() const {
  return static_cast<double>(num_tokens() * num_heads * head_size_v * size_of(dtype));
}

double Scenario::flops() const {
  double pairs = 0;
  for (const Seq& seq : seqs) pairs += visible_pairs(seq, window);
  return pairs * static_cast<double>(2 * (head_size_qk + head_size_v) * num_heads);
}

std::string describe_batch(const Scenario& scenario) {
  // Neighbours of the same query length and nearly the same number of keys are one group.
  constexpr std::int64_t kRagged = 61;
  std::vector<std::string> groups;
  for (std::size_t i = 0; i < scenario.seqs.size();) {
    const Seq& first = scenario.seqs[i];
    std::size_t end = i;
    std::int64_t longest = 0;
    bool same = true;
    for (; end < scenario.seqs.size(); ++end) {
      const Seq& seq = scenario.seqs[end];
      const std::int64_t apart = seq.seq_len - first.seq_len;
      if (seq.query_len != first.query_len || apart >= kRagged || apart <= -kRagged) break;
      longest = std::max(longest, seq.seq_len);
      same = same && apart == 0;
    }
    groups.push_back(
        fmt::format("{}x{}/{}{}", end - i, first.query_len, same ? "" : "<=", longest));
    i = end;
  }
  return fmt::format("{}", fmt::join(groups, " "));
}

std::vector<Scenario> parse_scenarios(std::string_view text, std::string_view where) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::exception& error) {
    fail(fmt::format("{} is not JSON: {}", where, error.what()));
  }
  Fields file(json, std::string(where));
  const Json& list = file.at("scenarios");
  file.all_read();
  if (!list.is_array() || list.empty()) {
    fail(fmt::format("{}: scenarios is {}, expected a list of scenarios", where,
                     list.dump().substr(0, 60)));
  }
  std::vector<Scenario> scenarios;
  std::set<std::string> names;
  for (std::size_t i = 0; i < list.size(); ++i) {
    scenarios.push_back(read_scenario(list[i], fmt::format("{}: scenarios[{}]", where, i)));
    if (!names.insert(scenarios.back().name).second) {
      fail(fmt::format("{}: scenarios[{}]: there are two of the name \"{}\"", where, i,
                       scenarios.back().name));
    }
  }
  return scenarios;
}

std::vector<Scenario> select_scenarios(const std::vector<Scenario>& scenarios,
                                       const std::string& pattern, std::string_view backend) {
  const auto matches = [&](const std::string& text) {
    return fnmatch(pattern.c_str(), text.c_str(), 0) == 0;
  };
  std::vector<Scenario> selected;
  std::vector<std::string> names;
  for (const Scenario& scenario : scenarios) {
    if (!backend.empty() && !scenario.backend.empty() && scenario.backend != backend) continue;
    names.push_back(scenario.name);
    if (pattern.empty() || matches(scenario.name) ||
        std::any_of(scenario.tags.begin(), scenario.tags.end(), matches)) {
      selected.push_back(scenario);
    }
  }
  if (names.empty()) fail(fmt::format("no scenario is for backend {}", backend));
  if (selected.empty()) {
    fail(fmt::format("--scenario is \"{}\", which matches no name and no tag; there are: {}",
                     pattern, fmt::join(names, ", ")));
  }
  return selected;
}

}  // namespace diffkv::bench
