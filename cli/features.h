// The features of the library as questions to a backend.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "cli/output.h"
#include "diffkv/backend.h"

namespace diffkv::cli {

// One row of the feature table: supported where the backend runs every one of the problems.
struct Feature {
  std::string group;
  std::string name;
  std::vector<Problem> problems;
};

// Every feature of the library, in the order of the table.
std::vector<Feature> features();

// "yes", "no", or "partly" where only some of the problems are run.
std::string_view support_of(const Backend& backend, const Feature& feature);

// Columns: feature group, feature, one per backend.
Table feature_table(const std::vector<const Backend*>& backends);

}  // namespace diffkv::cli
