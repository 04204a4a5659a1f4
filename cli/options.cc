#include "cli/options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <optional>
#include <system_error>

#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

std::optional<DType> find_dtype(std::string_view text, const std::vector<DType>& allowed) {
  try {
    const DType dtype = parse_dtype(text);
    if (std::find(allowed.begin(), allowed.end(), dtype) != allowed.end()) return dtype;
  } catch (const Error&) {  // parse_dtype knows more types than an option takes: the caller says so
    return std::nullopt;
  }
  return std::nullopt;
}

[[noreturn]] void refuse_dtype(std::string_view flag, std::string_view text,
                               const std::vector<DType>& allowed, std::string_view or_auto) {
  std::vector<std::string_view> names;
  names.reserve(allowed.size());
  for (const DType dtype : allowed) names.push_back(to_string(dtype));
  throw Error(ErrorCode::kInvalidArgument, fmt::format("{} is \"{}\", expected {}{}", flag, text,
                                                       or_auto, fmt::join(names, ", ")));
}

// The same for all ways to write a path; the last part, which a rename replaces, is not followed.
std::filesystem::path identity_of(const std::string& path) {
  const std::filesystem::path absolute = std::filesystem::absolute(path).lexically_normal();
  std::error_code missing;
  const auto folder = std::filesystem::weakly_canonical(absolute.parent_path(), missing);
  return (missing ? absolute.parent_path() : folder) / absolute.filename();
}

// Refuses an empty name of a file when it is parsed.
std::string not_empty(const std::string& name) {
  return name.empty() ? "expected the name of a file, got an empty one" : "";
}

}  // namespace

CLI::Option* add_output_file(CLI::App& command, const std::string& flag, std::string& path,
                             const std::string& help) {
  return command.add_option(flag, path, help)->type_name("FILE")->check(not_empty);
}

CLI::Option* add_input_files(CLI::App& command, const std::string& flag,
                             std::vector<std::string>& paths, const std::string& help) {
  return command.add_option(flag, paths, help)->type_name("FILE")->check(not_empty);
}

CLI::Validator whole_number(std::int64_t least, std::int64_t most) {
  return CLI::Range(least, most).description(fmt::format("{} to {}", least, most));
}

std::uint64_t parse_seed(std::string_view text, std::uint64_t if_empty) {
  if (text.empty()) return if_empty;
  std::uint64_t seed = 0;
  const char* end = text.data() + text.size();
  if (const auto [stop, error] = std::from_chars(text.data(), end, seed);
      error != std::errc() || stop != end) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--seed is \"{}\", expected a number from 0 to 2^64 - 1", text));
  }
  return seed;
}

DType parse_dtype_option(std::string_view flag, std::string_view text,
                         const std::vector<DType>& allowed) {
  const std::optional<DType> dtype = find_dtype(text, allowed);
  if (!dtype) refuse_dtype(flag, text, allowed, "one of ");
  return *dtype;
}

DType parse_dtype_option(std::string_view flag, std::string_view text,
                         const std::vector<DType>& allowed, DType if_auto) {
  if (text == "auto") return if_auto;
  const std::optional<DType> dtype = find_dtype(text, allowed);
  if (!dtype) refuse_dtype(flag, text, allowed, "one of auto, ");
  return *dtype;
}

const std::vector<DType>& cache_dtypes() {
  static const std::vector<DType> dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3,
                                            DType::kE5M2};
  return dtypes;
}

void refuse_same_file(const std::vector<NamedFile>& files) {
  for (std::size_t i = 0; i < files.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (files[i].path.empty() || files[j].path.empty()) continue;
      if (identity_of(files[i].path) != identity_of(files[j].path)) continue;
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{} and {} are both {}, expected different files", files[j].option,
                              files[i].option, files[i].path));
    }
  }
}

}  // namespace diffkv::cli
