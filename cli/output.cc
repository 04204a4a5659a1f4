#include "cli/output.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

// Code points, as near to columns as a table of names and numbers needs.
std::size_t width_of(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U;
  }));
}

std::string padded(const std::string& cell, std::size_t width, Table::Align align) {
  const std::string space(width - std::min(width, width_of(cell)), ' ');
  return align == Table::Align::kLeft ? cell + space : space + cell;
}

std::string without_trailing_spaces(std::string line) {
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

[[noreturn]] void fail(const std::string& path, int error) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("cannot write {}: {}", path, std::strerror(error)));
}

// What a new file would get: the temporary is made readable by its owner alone.
mode_t default_mode() {
  const mode_t mask = umask(0);
  umask(mask);
  return 0666 & ~mask;
}

}  // namespace

void Table::add_row(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

std::string Table::text() const {
  std::vector<std::size_t> widths;
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    std::size_t width = width_of(columns_[c].name);
    for (const auto& row : rows_) width = std::max(width, width_of(row[c]));
    widths.push_back(width);
  }
  std::string header;
  std::string rule;
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    const std::string gap = c == 0 ? "" : "  ";
    header += gap + padded(columns_[c].name, widths[c], columns_[c].align);
    rule += gap + std::string(widths[c], '-');
  }
  std::string out = without_trailing_spaces(header) + '\n' + rule + '\n';
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t c = 0; c < columns_.size(); ++c) {
      line += (c == 0 ? "" : "  ") + padded(row[c], widths[c], columns_[c].align);
    }
    out += without_trailing_spaces(line) + '\n';
  }
  return out;
}

std::string Table::markdown() const {
  std::string out = "|";
  std::string rule = "|";
  for (const Column& column : columns_) {
    out += fmt::format(" {} |", column.name);
    rule += column.align == Align::kLeft ? " --- |" : " ---: |";
  }
  out += '\n' + rule + '\n';
  for (const auto& row : rows_) {
    out += '|';
    for (const std::string& cell : row) out += fmt::format(" {} |", cell);
    out += '\n';
  }
  return out;
}

OutputFile::OutputFile(const std::string& path) : path_(path) {
  if (path.empty()) return;
  struct stat info {};
  // A rename would put a file in the place of a device such as /dev/stdout, and fails on a folder.
  if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("cannot write {}: it is there and not a regular file", path));
  }
  temporary_ = path + ".XXXXXX";  // the pattern that mkstemp asks for
  descriptor_ = mkstemp(temporary_.data());
  if (descriptor_ < 0) fail(path, errno);
}

OutputFile::~OutputFile() { discard(); }

void OutputFile::commit(std::string_view content) {
  if (!given()) return;
  while (!content.empty()) {
    const ssize_t written = write(descriptor_, content.data(), content.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path_, errno);
    content.remove_prefix(static_cast<std::size_t>(written));
  }
  if (fchmod(descriptor_, default_mode()) != 0) fail(path_, errno);
  const int closed = close(descriptor_);
  descriptor_ = -1;
  if (closed != 0 || std::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    unlink(temporary_.c_str());
    fail(path_, error);
  }
}

void OutputFile::discard() noexcept {
  if (descriptor_ < 0) return;
  close(descriptor_);
  unlink(temporary_.c_str());
  descriptor_ = -1;
}

std::string json_text(const nlohmann::json& json) {
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + '\n';
}

std::string human_bytes(double bytes) {
  constexpr std::array<std::string_view, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  while (bytes >= 1024.0 && unit + 1 < kUnits.size()) {
    bytes /= 1024.0;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.1f} {}", bytes, kUnits[unit]);
}

}  // namespace diffkv::cli
