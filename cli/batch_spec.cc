#include "cli/batch_spec.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <string>

#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

constexpr std::string_view kSeqs = "--seqs";
constexpr std::string_view kSeqsForm =
    "QUERY_LENxSEQ_LEN or QUERY_LENxSEQ_LEN*COUNT, e.g. 1x8192*64";

[[noreturn]] void fail(std::string_view flag, std::string_view part, std::string_view expected) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{} has \"{}\", expected {}", flag, part, expected));
}

// The number that all of `text` is; `part` is what messages show, `form` what it should be.
std::int32_t parse_number(std::string_view text, std::string_view flag, std::string_view part,
                          std::string_view form) {
  std::int32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range) fail(flag, part, "numbers up to 2147483647");
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    fail(flag, part, form);
  }
  return value;
}

// Calls fn with each part between commas.
template <class Fn>
void for_each_part(std::string_view text, Fn&& fn) {
  for (;;) {
    const std::size_t comma = text.find(',');
    fn(text.substr(0, comma));
    if (comma == std::string_view::npos) return;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace

std::vector<SeqLengths> parse_batch(std::string_view text) {
  std::vector<SeqLengths> seqs;
  std::int64_t tokens = 0;
  for_each_part(text, [&](std::string_view part) {
    const std::size_t star = part.find('*');
    const std::string_view lengths = part.substr(0, star);
    const std::size_t x = lengths.find('x');
    if (x == std::string_view::npos) fail(kSeqs, part, kSeqsForm);
    SeqLengths seq;
    seq.query_len = parse_number(lengths.substr(0, x), kSeqs, part, kSeqsForm);
    seq.seq_len = parse_number(lengths.substr(x + 1), kSeqs, part, kSeqsForm);
    const std::int64_t count = star == std::string_view::npos
                                   ? 1
                                   : parse_number(part.substr(star + 1), kSeqs, part, kSeqsForm);
    if (count > kMaxSeqs - static_cast<std::int64_t>(seqs.size())) {
      fail(kSeqs, part, fmt::format("at most {} sequences in all", kMaxSeqs));
    }
    tokens += count * seq.query_len;
    if (tokens > std::numeric_limits<std::int32_t>::max()) {
      fail(kSeqs, part, "at most 2147483647 query tokens in all");
    }
    seqs.insert(seqs.end(), static_cast<std::size_t>(count), seq);
  });
  return seqs;
}

std::vector<bool> parse_causal(std::string_view text) {
  std::vector<bool> causal;
  for_each_part(text, [&](std::string_view part) {
    if (part != "yes" && part != "no") fail("--causal-per-seq", part, "yes or no");
    causal.push_back(part == "yes");
  });
  return causal;
}

std::vector<PositionRange> parse_ranges(std::string_view text) {
  constexpr std::string_view kFlag = "--mm-ranges";
  constexpr std::string_view kForm = "FIRST-LAST, FIRST below LAST, e.g. 20-150";
  std::vector<PositionRange> ranges;
  for_each_part(text, [&](std::string_view part) {
    const std::size_t dash = part.find('-');
    if (dash == std::string_view::npos) fail(kFlag, part, kForm);
    const PositionRange range{parse_number(part.substr(0, dash), kFlag, part, kForm),
                              parse_number(part.substr(dash + 1), kFlag, part, kForm)};
    if (range.first >= range.last) fail(kFlag, part, kForm);
    ranges.push_back(range);
  });
  return ranges;
}

}  // namespace diffkv::cli
