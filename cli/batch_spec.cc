#include "cli/batch_spec.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <string>

#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

[[noreturn]] void fail(std::string_view part, std::string_view expected) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--seqs has \"{}\", expected {}", part, expected));
}

// The number that all of `text` is; `part` is what messages show.
std::int32_t parse_number(std::string_view text, std::string_view part) {
  std::int32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range) fail(part, "numbers up to 2147483647");
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    fail(part, "QUERY_LENxSEQ_LEN or QUERY_LENxSEQ_LEN*COUNT, e.g. 1x8192*64");
  }
  return value;
}

}  // namespace

std::vector<SeqLengths> parse_batch(std::string_view text) {
  std::vector<SeqLengths> seqs;
  std::int64_t tokens = 0;
  for (;;) {
    const std::size_t comma = text.find(',');
    const std::string_view part = text.substr(0, comma);
    const std::size_t star = part.find('*');
    const std::string_view lengths = part.substr(0, star);
    const std::size_t x = lengths.find('x');
    if (x == std::string_view::npos) {
      fail(part, "QUERY_LENxSEQ_LEN or QUERY_LENxSEQ_LEN*COUNT, e.g. 1x8192*64");
    }
    SeqLengths seq;
    seq.query_len = parse_number(lengths.substr(0, x), part);
    seq.seq_len = parse_number(lengths.substr(x + 1), part);
    const std::int64_t count =
        star == std::string_view::npos ? 1 : parse_number(part.substr(star + 1), part);
    if (count > kMaxSeqs - static_cast<std::int64_t>(seqs.size())) {
      fail(part, fmt::format("at most {} sequences in all", kMaxSeqs));
    }
    tokens += count * seq.query_len;
    if (tokens > std::numeric_limits<std::int32_t>::max()) {
      fail(part, "at most 2147483647 query tokens in all");
    }
    seqs.insert(seqs.end(), static_cast<std::size_t>(count), seq);
    if (comma == std::string_view::npos) return seqs;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace diffkv::cli
