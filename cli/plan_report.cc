#include "cli/plan_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "cli/output.h"
#include "plan/classes.h"

namespace diffkv::cli {
namespace {

std::int64_t cost_of(const TileClass& cls, const WorkItem& item) {
  std::int64_t blocks = 0;
  for (const KeyRange& keys : item.keys) {
    if (keys.begin >= keys.end) continue;
    blocks += (keys.end + cls.block_keys - 1) / cls.block_keys - keys.begin / cls.block_keys;
  }
  return cls.tile_cost + blocks * cls.block_cost;
}

std::vector<std::vector<Share>> shares_of(const ScheduleLimits& limits,
                                          const std::vector<WorkItem>& items) {
  std::vector<std::vector<Share>> shares(static_cast<std::size_t>(limits.num_classes));
  for (std::size_t c = 0; c < shares.size(); ++c) {
    shares[c].resize(static_cast<std::size_t>(limits.classes[c].workers));
  }
  for (const WorkItem& item : items) {
    Share& share =
        shares[static_cast<std::size_t>(item.tile_class)][static_cast<std::size_t>(item.worker)];
    ++share.items;
    share.cut += item.slot >= 0 ? 1 : 0;
    share.rows += item.num_rows;
    for (const KeyRange& keys : item.keys) share.keys += keys.end - keys.begin;
    share.cost += cost_of(limits.classes[static_cast<std::size_t>(item.tile_class)], item);
  }
  return shares;
}

struct Balance {
  std::int64_t total = 0;
  std::int64_t most = 0;
  double ratio = 1.0;  // the most a worker has to the mean
};

Balance balance_of(const std::vector<Share>& shares) {
  Balance balance;
  for (const Share& share : shares) {
    balance.total += share.cost;
    balance.most = std::max(balance.most, share.cost);
  }
  if (balance.total > 0) {
    balance.ratio = static_cast<double>(balance.most) * static_cast<double>(shares.size()) /
                    static_cast<double>(balance.total);
  }
  return balance;
}

std::string range_text(const KeyRange& keys) {
  return keys.begin < keys.end ? fmt::format("[{}, {})", keys.begin, keys.end) : "-";
}

Table class_table(const ScheduleLimits& limits) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"class", kRight},
               {"rows", kRight},
               {"of sequences with rows", kRight},
               {"keys in a block", kRight},
               {"workers", kRight},
               {"tile cost", kRight},
               {"block cost", kRight},
               {"least cut", kRight}});
  for (std::int32_t c = 0; c < limits.num_classes; ++c) {
    const TileClass& cls = limits.classes[static_cast<std::size_t>(c)];
    const bool last = c + 1 == limits.num_classes;
    table.add_row({fmt::format("{}", c), fmt::format("{}", cls.tile_rows),
                   last                                  ? "any other"
                   : plan::can_have_sequences(limits, c) ? fmt::format("<= {}", cls.max_seq_rows)
                                                         : "none",
                   fmt::format("{}", cls.block_keys), fmt::format("{}", cls.workers),
                   fmt::format("{}", cls.tile_cost), fmt::format("{}", cls.block_cost),
                   fmt::format("{}", cls.least_cut)});
  }
  return table;
}

Table share_table(const std::vector<Share>& shares, std::int64_t total) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"worker", kRight},
               {"whole tiles", kRight},
               {"pieces", kRight},
               {"rows", kRight},
               {"keys", kRight},
               {"cost", kRight},
               {"of all", kRight}});
  for (std::size_t w = 0; w < shares.size(); ++w) {
    const Share& share = shares[w];
    table.add_row({fmt::format("{}", w), fmt::format("{}", share.items - share.cut),
                   fmt::format("{}", share.cut), fmt::format("{}", share.rows),
                   fmt::format("{}", share.keys), fmt::format("{}", share.cost),
                   fmt::format("{:.1f} %", 100.0 * static_cast<double>(share.cost) /
                                               static_cast<double>(total))});
  }
  return table;
}

Table item_table(const std::vector<WorkItem>& items) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"class", kRight},
               {"worker", kRight},
               {"sequence", kRight},
               {"KV heads", kRight},
               {"rows"},
               {"prefix keys"},
               {"keys"},
               {"slot", kRight}});
  for (const WorkItem& item : items) {
    const bool two = item.keys[1].begin < item.keys[1].end;
    table.add_row({fmt::format("{}", item.tile_class), fmt::format("{}", item.worker),
                   fmt::format("{}", item.seq),
                   item.num_kv_heads == 1
                       ? fmt::format("{}", item.kv_head)
                       : range_text({item.kv_head, item.kv_head + item.num_kv_heads}),
                   range_text({item.first_row, item.first_row + item.num_rows}),
                   two ? range_text(item.keys[0]) : "-", range_text(item.keys[two ? 1 : 0]),
                   item.slot < 0 ? "whole" : fmt::format("{}", item.slot)});
  }
  return table;
}

}  // namespace

PlanReport::PlanReport(const Plan& plan, const Batch& batch, std::int64_t workspace,
                       bool with_items)
    : plan_(plan),
      batch_(batch),
      workspace_(workspace),
      with_items_(with_items),
      items_(plan.work_items(batch)),
      shares_(shares_of(plan.limits(), items_)) {}

std::int64_t PlanReport::slots_used() const {
  return std::count_if(items_.begin(), items_.end(), [](const WorkItem& i) { return i.slot >= 0; });
}

std::string PlanReport::text() const {
  const ScheduleLimits& limits = plan_.limits();
  std::string text;
  const auto out = std::back_inserter(text);
  fmt::format_to(out, "layer      {}\n", to_string(plan_.key()));
  fmt::format_to(out, "batch      {} sequences, {} query tokens\n", batch_.num_seqs,
                 batch_.num_actual_tokens);
  fmt::format_to(out, "workspace  {} ({} bytes), {} of {} partial slots used\n",
                 human_bytes(static_cast<double>(workspace_)), workspace_, slots_used(),
                 plan_.tables().num_slots);
  fmt::format_to(out, "\nTile classes, {} threads\n\n{}", limits.threads,
                 class_table(limits).text());
  for (std::size_t c = 0; c < shares_.size(); ++c) {
    const Balance balance = balance_of(shares_[c]);
    if (balance.total == 0) {
      fmt::format_to(out, "\nClass {}: no work\n", c);
      continue;
    }
    fmt::format_to(out, "\nClass {}: cost {}, the largest share is {:.3f} of the mean\n\n{}", c,
                   balance.total, balance.ratio, share_table(shares_[c], balance.total).text());
  }
  if (with_items_) fmt::format_to(out, "\nWork items\n\n{}", item_table(items_).text());
  return text;
}

nlohmann::json PlanReport::json() const {
  const ScheduleLimits& limits = plan_.limits();
  nlohmann::json json = {{"key", to_string(plan_.key())},      {"sequences", batch_.num_seqs},
                         {"tokens", batch_.num_actual_tokens}, {"workspace_bytes", workspace_},
                         {"slots", plan_.tables().num_slots},  {"slots_used", slots_used()},
                         {"classes", nlohmann::json::array()}};
  for (std::size_t c = 0; c < shares_.size(); ++c) {
    const TileClass& cls = limits.classes[c];
    const Balance balance = balance_of(shares_[c]);
    nlohmann::json entry = {{"tile_rows", cls.tile_rows},   {"max_seq_rows", cls.max_seq_rows},
                            {"block_keys", cls.block_keys}, {"tile_cost", cls.tile_cost},
                            {"block_cost", cls.block_cost}, {"least_cut", cls.least_cut},
                            {"cost", balance.total},        {"max_over_mean", balance.ratio}};
    for (const Share& share : shares_[c]) {
      entry["workers"].push_back({{"items", share.items},
                                  {"cut", share.cut},
                                  {"rows", share.rows},
                                  {"keys", share.keys},
                                  {"cost", share.cost}});
    }
    json["classes"].push_back(std::move(entry));
  }
  if (!with_items_) return json;
  json["items"] = nlohmann::json::array();
  for (const WorkItem& item : items_) {
    nlohmann::json keys = nlohmann::json::array();
    for (const KeyRange& range : item.keys) {
      if (range.begin < range.end) keys.push_back({range.begin, range.end});
    }
    json["items"].push_back({{"class", item.tile_class},
                             {"worker", item.worker},
                             {"sequence", item.seq},
                             {"kv_head", item.kv_head},
                             {"num_kv_heads", item.num_kv_heads},
                             {"first_row", item.first_row},
                             {"num_rows", item.num_rows},
                             {"keys", std::move(keys)},
                             {"slot", item.slot}});
  }
  return json;
}

}  // namespace diffkv::cli
