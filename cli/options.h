// Options that several subcommands have, read in one way.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "diffkv/tensor.h"

namespace diffkv::cli {

// Adds an option that names a file to write. An empty name is refused when it is parsed; the string
// stays empty where the option is not given.
CLI::Option* add_output_file(CLI::App& command, const std::string& flag, std::string& path,
                             const std::string& help);

// Likewise for any number of files to read.
CLI::Option* add_input_files(CLI::App& command, const std::string& flag,
                             std::vector<std::string>& paths, const std::string& help);

// Accepts whole numbers from `least` to `most`; the help says which.
CLI::Validator whole_number(std::int64_t least, std::int64_t most);

// The number that --seed gives, or `if_empty` where the text is empty. Read from text, because
// CLI11 takes -1 for the largest number. Throws Error unless it is a whole number below 2^64.
std::uint64_t parse_seed(std::string_view text, std::uint64_t if_empty);

// The type that this flag names. Throws Error that names the flag and lists `allowed` unless the
// text is a name of one of these.
DType parse_dtype_option(std::string_view flag, std::string_view text,
                         const std::vector<DType>& allowed);
// Likewise, with "auto" for `if_auto`.
DType parse_dtype_option(std::string_view flag, std::string_view text,
                         const std::vector<DType>& allowed, DType if_auto);

// The types that a cache is stored in.
const std::vector<DType>& cache_dtypes();

// A file that a command reads or writes, and the option that names it.
struct NamedFile {
  std::string option;
  std::string path;  // "": not given
};

// Throws Error if two of the options name one file: one would overwrite the other.
void refuse_same_file(const std::vector<NamedFile>& files);

}  // namespace diffkv::cli
