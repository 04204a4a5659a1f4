#include "replay/report.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "replay/plot.h"

namespace diffkv::replay {
namespace {

// Checks that every tag is closed in order; returns how many elements there are.
int check_well_formed(const std::string& html) {
  const std::set<std::string> empty = {"!doctype", "meta", "br"};
  std::vector<std::string> open;
  int elements = 0;
  for (std::size_t at = html.find('<'); at != std::string::npos; at = html.find('<', at + 1)) {
    const std::size_t end = html.find('>', at);
    EXPECT_NE(end, std::string::npos);
    const std::string tag = html.substr(at + 1, end - at - 1);
    const std::string name = tag.substr(0, tag.find_first_of(" \n/", 1));
    if (tag[0] == '/') {
      EXPECT_FALSE(open.empty()) << tag;
      if (open.empty()) return elements;
      EXPECT_EQ("/" + open.back(), tag);
      open.pop_back();
    } else {
      ++elements;
      if (empty.count(name) == 0 && tag.back() != '/') open.push_back(name);
    }
  }
  EXPECT_TRUE(open.empty());
  return elements;
}

ReplayResult made_up(int num_steps) {
  ReplayResult result;
  for (int i = 0; i < num_steps; ++i) {
    result.steps.push_back({.start_s = i * 0.5,
                            .attend_s = 0.001 * (1 + i % 50),
                            .prefill_tokens = i % 3 == 0 ? 0 : 100,
                            .decode_tokens = i % 3 == 1 ? 0 : 10,
                            .full_occupancy = 0.3,
                            .window_occupancy = 0.6});
  }
  return result;
}

TEST(Report, IsOneWellFormedPageWithItsPlots) {
  const ReplayResult result = made_up(500);
  const std::string html =
      html_report(result, summarize(result), {"a <b> & \"c\".csv", "some model"});
  EXPECT_GT(check_well_formed(html), 100);
  std::size_t plots = 0;
  for (std::size_t at = 0; (at = html.find("<svg", at)) != std::string::npos; ++at) ++plots;
  EXPECT_EQ(plots, 4U);
  EXPECT_NE(html.find("a &lt;b&gt; &amp; &quot;c&quot;.csv"), std::string::npos);
  EXPECT_EQ(html.find("<b> &"), std::string::npos);
  EXPECT_EQ(html.find("http"), std::string::npos);  // nothing from outside
  EXPECT_EQ(html.find("nan"), std::string::npos);
  EXPECT_EQ(html.find("inf"), std::string::npos);
}

TEST(Report, OfNoStepsAndOfManyIsWellFormed) {
  EXPECT_GT(check_well_formed(html_report({}, {}, {"t", "m"})), 30);
  const ReplayResult many = made_up(50000);
  const std::string html = html_report(many, summarize(many), {"t", "m"});
  EXPECT_GT(check_well_formed(html), 100);
  EXPECT_LT(html.size(), 300000U);  // steps are thinned out
}

TEST(Report, SaysWhenRowsAreWrong) {
  ReplayResult result = made_up(3);
  result.verify.rows_full = 5;
  result.verify.rows_wrong = 2;
  result.verify.first_wrong = "token 3 <wrong>";
  const std::string html = html_report(result, summarize(result), {"t", "m"});
  EXPECT_NE(html.find("<b>2 of 5</b><span>verified rows wrong"), std::string::npos);
  EXPECT_NE(html.find("token 3 &lt;wrong&gt;"), std::string::npos);
}

TEST(Plot, AxesEndAtRoundNumbers) {
  EXPECT_DOUBLE_EQ(linear_axis("", 2048).high, 2500.0);
  EXPECT_DOUBLE_EQ(linear_axis("", 100).high, 100.0);
  EXPECT_DOUBLE_EQ(linear_axis("", 0).high, 1.0);
  const Axis axis = log_axis("", {0.0, 0.5, 30.0});
  EXPECT_DOUBLE_EQ(axis.low, 0.1);
  EXPECT_DOUBLE_EQ(axis.high, 100.0);
  EXPECT_DOUBLE_EQ(log_axis("", {}).high, 10.0);
}

TEST(Plot, PutsPointsWhereTheyBelong) {
  Plot plot("id", "t", "d", linear_axis("x", 10), linear_axis("y", 10));
  plot.line({{0, 0}, {10, 10}, {20, -5}}, 1);  // the last is moved to the corner
  EXPECT_NE(plot.svg().find("d=\"M66.0 214.0L748.0 12.0L748.0 214.0\""), std::string::npos);
}

}  // namespace
}  // namespace diffkv::replay
