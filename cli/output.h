// What the subcommands print and write: aligned tables and files that are whole or not there.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace diffkv::cli {

// A table for people. Every row has as many cells as the header.
class Table {
 public:
  enum class Align { kLeft, kRight };

  struct Column {
    std::string name;
    Align align = Align::kLeft;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  void add_row(std::vector<std::string> cells);

  // Aligned columns, two spaces between, a header and a rule; no trailing spaces.
  std::string text() const;
  // A GitHub table.
  std::string markdown() const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

// A file that appears whole or not at all: written to a temporary beside it, then renamed.
class OutputFile {
 public:
  OutputFile() = default;  // no file: commit does nothing
  // Opens the temporary at once, so that a path that cannot be written is refused before any work
  // is done. An empty path means no file. Throws Error(kInvalidArgument) with the reason.
  explicit OutputFile(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  bool given() const { return !path_.empty(); }
  // Writes and renames. Throws Error if the disk does not take it; the old file, if any, stays.
  void commit(std::string_view content);

 private:
  void discard() noexcept;

  std::string path_;
  std::string temporary_;
  int descriptor_ = -1;
};

// Indented JSON with a newline at its end; bytes that are not UTF-8 are replaced.
std::string json_text(const nlohmann::json& json);

// "1.5 MiB", "17 B".
std::string human_bytes(double bytes);

}  // namespace diffkv::cli
