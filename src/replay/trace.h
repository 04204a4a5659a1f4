// Request traces: when requests came, how long their prompts were, how much they generated.
#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

namespace diffkv::replay {

struct TraceRequest {
  double arrival_s = 0.0;             // seconds after the trace's first request
  std::int64_t prompt_tokens = 0;     // at least 1
  std::int64_t generated_tokens = 0;  // at least 1
};

// More tokens than any request of a real model; larger numbers are refused as mistakes.
inline constexpr std::int64_t kMaxRequestTokens = 1 << 24;
// Longest line and most rows a reader takes, so that a wrong file is an error, not a full memory.
inline constexpr std::size_t kMaxLineBytes = 1 << 16;
inline constexpr std::size_t kMaxTraceRows = 1 << 24;

// Reads a CSV file with a header that names TIMESTAMP, ContextTokens and GeneratedTokens, in any
// order and among any other columns. Lines end in LF or CRLF; a UTF-8 byte order mark, quoted
// fields ("" inside quotes is a quote), blanks around fields and empty lines are accepted; a
// quoted field may not span lines. TIMESTAMP is "YYYY-MM-DD HH:MM:SS[.fraction]" (a T in place of
// the space and a Z at the end are accepted) or a plain number of seconds, the same kind in every
// row. Requests are returned by time of arrival; rows out of order are sorted, equal times keep the
// file's order.
// `name` is the file's name in messages. Throws Error(kInvalidArgument) with name, line and column
// for a malformed row, a missing or repeated column, token counts outside [1, kMaxRequestTokens],
// an unreadable stream, and a file without rows.
std::vector<TraceRequest> read_trace(std::istream& in, const std::string& name);

// As read_trace, of a file. Throws Error also if it cannot be opened.
std::vector<TraceRequest> read_trace_file(const std::string& path);

}  // namespace diffkv::replay
