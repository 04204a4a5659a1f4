#include "replay/model.h"

#include <gtest/gtest.h>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Model, HeadsAreDivided) {
  const Model& flash = find_model("mimo-v2-flash");
  const Model four = divide_heads(flash, 4);
  EXPECT_EQ(four.full.num_heads, 16);
  EXPECT_EQ(four.full.num_kv_heads, 1);
  EXPECT_EQ(four.window.num_heads, 16);
  EXPECT_EQ(four.window.num_kv_heads, 2);
  const Model eight = divide_heads(flash, 8);
  EXPECT_EQ(eight.full.num_heads, 8);
  EXPECT_EQ(eight.full.num_kv_heads, 1);  // shared by two ranks
  EXPECT_EQ(eight.window.num_kv_heads, 1);
  EXPECT_TRUE(eight.window.sinks);
  EXPECT_FALSE(eight.full.sinks);
  EXPECT_EQ(divide_heads(find_model("mimo-v2.5-pro"), 16).full.num_heads, 8);
}

TEST(Model, RefusesHeadsThatDoNotDivide) {
  const Model& flash = find_model("mimo-v2-flash");
  for (const std::int64_t tp :
       {std::int64_t{-1}, std::int64_t{0}, std::int64_t{3}, std::int64_t{128}}) {
    EXPECT_NE(message_of([&] {
                divide_heads(flash, tp);
              }).find("tp is " + std::to_string(tp) + ", expected a number that divides the 64"),
              std::string::npos)
        << tp;
  }
}

TEST(Model, UnknownNameListsTheKnown) {
  EXPECT_EQ(message_of([] { find_model("gpt"); }),
            "model is \"gpt\", expected one of mimo-v2-flash, mimo-v2.5-pro");
}

TEST(Model, LayersAreChosen) {
  const Model& flash = find_model("mimo-v2-flash");
  const auto chosen = [&](const char* text) {
    const Model model = choose_layers(flash, text);
    return std::pair(model.full.num_layers, model.window.num_layers);
  };
  using Layers = std::pair<std::int64_t, std::int64_t>;
  EXPECT_EQ(chosen("1:1"), Layers(1, 1));
  EXPECT_EQ(chosen("9:39"), Layers(9, 39));
  EXPECT_EQ(chosen("48"), Layers(9, 39));
  EXPECT_EQ(chosen("2"), Layers(1, 1));
  EXPECT_EQ(chosen("16"), Layers(3, 13));
  for (const char* bad :
       {"", "1", "0:1", "1:0", "10:1", "1:40", "49", "1:1:1", "a", "-2", "1:", " 2"}) {
    EXPECT_NE(
        message_of([&] { choose_layers(flash, bad); }).find("expected FULL:WINDOW of 1:1 to 9:39"),
        std::string::npos)
        << bad;
  }
}

}  // namespace
}  // namespace diffkv::replay
