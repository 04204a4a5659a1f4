#include "replay/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string_view>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

enum Column : std::size_t { kTimestamp, kContext, kGenerated, kNumColumns };
constexpr std::array<std::string_view, kNumColumns> kColumnNames = {"TIMESTAMP", "ContextTokens",
                                                                    "GeneratedTokens"};
constexpr double kMaxSeconds = 1e12;  // plain seconds beyond it lose the fractions that matter

enum class TimeKind { kDate, kSeconds };

struct Time {
  TimeKind kind = TimeKind::kSeconds;
  // Whole seconds apart from the fraction: a date in a double would keep only microseconds.
  std::int64_t seconds = 0;
  double fraction = 0.0;
};

struct Row {
  Time time;
  std::int64_t prompt_tokens = 0;
  std::int64_t generated_tokens = 0;
};

// Where in the file the reader is, for messages.
struct Place {
  const std::string& name;
  std::size_t line = 0;

  [[noreturn]] void fail(const std::string& message) const {
    throw Error(ErrorCode::kInvalidArgument, fmt::format("{}:{}: {}", name, line, message));
  }
  [[noreturn]] void fail(Column column, std::string_view got, std::string_view expected) const {
    fail(fmt::format("{} is {}, expected {}", kColumnNames[column], quoted(got), expected));
  }

  // The text in quotes, cut short, with control characters made visible.
  static std::string quoted(std::string_view text) {
    constexpr std::size_t kMaxShown = 40;
    std::string shown = "\"";
    for (const char c : text.substr(0, kMaxShown)) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte < 0x20 || byte == 0x7f) {
        shown += fmt::format("\\x{:02x}", byte);
      } else {
        shown += c;
      }
    }
    return shown + (text.size() > kMaxShown ? "...\"" : "\"");
  }
};

std::string_view trim(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
}

std::vector<std::string> split_fields(std::string_view line, const Place& place) {
  std::vector<std::string> fields;
  std::size_t at = 0;
  while (true) {
    const std::size_t first = std::min(line.find_first_not_of(" \t", at), line.size());
    if (first < line.size() && line[first] == '"') {
      std::string field;
      std::size_t i = first + 1;
      for (;; ++i) {
        if (i >= line.size()) {
          place.fail(fmt::format("field {} has an opening quote without a closing one",
                                 fields.size() + 1));
        }
        if (line[i] == '"') {
          if (i + 1 >= line.size() || line[i + 1] != '"') break;
          ++i;  // a doubled quote stands for one
        }
        field += line[i];
      }
      const std::size_t comma = std::min(line.find(',', i), line.size());
      const std::string_view rest = trim(line.substr(i + 1, comma - i - 1));
      if (!rest.empty()) {
        place.fail(fmt::format("field {} goes on after its closing quote with {}",
                               fields.size() + 1, Place::quoted(rest)));
      }
      fields.emplace_back(trim(field));
      at = comma;
    } else {
      const std::size_t comma = std::min(line.find(',', at), line.size());
      fields.emplace_back(trim(line.substr(at, comma - at)));
      at = comma;
    }
    if (at >= line.size()) return fields;
    ++at;
  }
}

// Positions of the three columns in a row.
std::array<std::size_t, kNumColumns> find_columns(const std::vector<std::string>& header,
                                                  const Place& place) {
  std::array<std::size_t, kNumColumns> positions{};
  for (std::size_t c = 0; c < kNumColumns; ++c) {
    const auto count = std::count(header.begin(), header.end(), kColumnNames[c]);
    if (count != 1) {
      std::string names;
      for (const std::string& name : header) {
        names += (names.empty() ? "" : ", ") + Place::quoted(name);
        if (names.size() > 200) break;
      }
      place.fail(fmt::format("the header has column {} {} times, expected once; it has {}",
                             kColumnNames[c], count, names));
    }
    positions[c] = static_cast<std::size_t>(
        std::find(header.begin(), header.end(), kColumnNames[c]) - header.begin());
  }
  return positions;
}

std::int64_t parse_tokens(std::string_view text, Column column, const Place& place) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = end == text.data() + text.size();
  if (error == std::errc::invalid_argument || !whole) place.fail(column, text, "a whole number");
  if (error == std::errc::result_out_of_range || value < 1 || value > kMaxRequestTokens) {
    place.fail(column, text, fmt::format("1 to {} tokens", kMaxRequestTokens));
  }
  return value;
}

// Digits of exactly this width, or nothing.
std::optional<int> parse_digits(std::string_view text, std::size_t at, std::size_t width) {
  if (at + width > text.size()) return std::nullopt;
  int value = 0;
  for (std::size_t i = at; i < at + width; ++i) {
    if (text[i] < '0' || text[i] > '9') return std::nullopt;
    value = value * 10 + (text[i] - '0');
  }
  return value;
}

// "YYYY-MM-DD HH:MM:SS[.fraction][Z]", or nothing.
std::optional<Time> parse_date(std::string_view text) {
  constexpr std::size_t kLength = 19;
  if (text.ends_with('Z')) text.remove_suffix(1);
  const auto year = parse_digits(text, 0, 4);
  const auto month = parse_digits(text, 5, 2);
  const auto day = parse_digits(text, 8, 2);
  const auto hour = parse_digits(text, 11, 2);
  const auto minute = parse_digits(text, 14, 2);
  const auto second = parse_digits(text, 17, 2);
  if (!year || !month || !day || !hour || !minute || !second) return std::nullopt;
  if (text[4] != '-' || text[7] != '-' || (text[10] != ' ' && text[10] != 'T') || text[13] != ':' ||
      text[16] != ':') {
    return std::nullopt;
  }
  const std::chrono::year_month_day date{std::chrono::year{*year},
                                         std::chrono::month{static_cast<unsigned>(*month)},
                                         std::chrono::day{static_cast<unsigned>(*day)}};
  if (!date.ok() || *hour > 23 || *minute > 59 || *second > 60) return std::nullopt;
  Time time{.kind = TimeKind::kDate};
  const std::chrono::sys_days midnight = date;
  const std::int64_t days = midnight.time_since_epoch().count();
  time.seconds = ((days * 24 + *hour) * 60 + *minute) * 60 + *second;
  if (text.size() > kLength) {
    if (text[kLength] != '.' || text.size() == kLength + 1) return std::nullopt;
    double unit = 0.1;
    for (const char c : text.substr(kLength + 1)) {
      if (c < '0' || c > '9') return std::nullopt;
      time.fraction += unit * (c - '0');
      unit /= 10.0;
    }
  }
  return time;
}

// A plain number of seconds, or nothing.
std::optional<Time> parse_seconds(std::string_view text) {
  double value = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  if (!std::isfinite(value) || std::abs(value) > kMaxSeconds) return std::nullopt;
  const double whole = std::floor(value);
  return Time{TimeKind::kSeconds, static_cast<std::int64_t>(whole), value - whole};
}

Time parse_time(std::string_view text, const Place& place) {
  if (const auto date = parse_date(text)) return *date;
  if (const auto seconds = parse_seconds(text)) return *seconds;
  place.fail(kTimestamp, text, "\"YYYY-MM-DD HH:MM:SS[.fraction]\" or seconds (at most 1e12)");
}

// The next line without its end, false at the end of the file.
bool next_line(std::istream& in, std::string& line, Place& place) {
  line.clear();
  ++place.line;
  constexpr auto kEnd = std::istream::traits_type::eof();
  bool any = false;
  for (auto c = in.get(); c != kEnd; c = in.get()) {
    any = true;
    if (c == '\n') break;
    line += static_cast<char>(c);
    if (line.size() > kMaxLineBytes) {
      place.fail(fmt::format("the line is longer than {} bytes", kMaxLineBytes));
    }
  }
  if (in.bad()) place.fail("reading failed");
  if (line.ends_with('\r')) line.pop_back();
  return any;
}

}  // namespace

std::vector<TraceRequest> read_trace(std::istream& in, const std::string& name) {
  Place place{name};
  std::string line;
  std::optional<std::array<std::size_t, kNumColumns>> columns;
  std::size_t num_fields = 0;
  std::vector<Row> rows;
  while (next_line(in, line, place)) {
    if (place.line == 1 && line.starts_with("\xEF\xBB\xBF")) line.erase(0, 3);
    if (trim(line).empty()) continue;
    const std::vector<std::string> fields = split_fields(line, place);
    if (!columns) {
      columns = find_columns(fields, place);
      num_fields = fields.size();
      continue;
    }
    if (fields.size() != num_fields) {
      place.fail(fmt::format("the row has {} fields, expected {} as in the header", fields.size(),
                             num_fields));
    }
    if (rows.size() == kMaxTraceRows) place.fail(fmt::format("more than {} rows", kMaxTraceRows));
    Row row;
    row.time = parse_time(fields[(*columns)[kTimestamp]], place);
    row.prompt_tokens = parse_tokens(fields[(*columns)[kContext]], kContext, place);
    row.generated_tokens = parse_tokens(fields[(*columns)[kGenerated]], kGenerated, place);
    if (!rows.empty() && rows.front().time.kind != row.time.kind) {
      place.fail(kTimestamp, fields[(*columns)[kTimestamp]],
                 "the first row's kind of time (a date in every row, or seconds in every row)");
    }
    rows.push_back(row);
  }
  if (rows.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: the trace is empty ({}), expected a header and at least one row",
                            name, columns ? "a header without rows" : "no header"));
  }
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return std::pair(a.time.seconds, a.time.fraction) < std::pair(b.time.seconds, b.time.fraction);
  });
  std::vector<TraceRequest> requests;
  requests.reserve(rows.size());
  const Time first = rows.front().time;
  for (const Row& row : rows) {
    const double arrival = static_cast<double>(row.time.seconds - first.seconds) +
                           (row.time.fraction - first.fraction);
    requests.push_back({std::max(arrival, 0.0), row.prompt_tokens, row.generated_tokens});
  }
  return requests;
}

std::vector<TraceRequest> read_trace_file(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{} is a directory, expected a CSV file", path));
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("cannot open {}, expected a readable CSV file with the columns "
                            "TIMESTAMP, ContextTokens, GeneratedTokens",
                            path));
  }
  return read_trace(in, path);
}

}  // namespace diffkv::replay
