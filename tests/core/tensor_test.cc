#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "diffkv/tensor.h"

namespace diffkv {
namespace {

TEST(DTypeNames, ParseIsTheInverseOfPrint) {
  const std::pair<DType, std::string_view> names[] = {
      {DType::kF32, "fp32"},      {DType::kF16, "fp16"},      {DType::kBF16, "bf16"},
      {DType::kE4M3, "fp8_e4m3"}, {DType::kE5M2, "fp8_e5m2"}, {DType::kU8, "uint8"},
      {DType::kBool, "bool"},     {DType::kI32, "int32"},     {DType::kI64, "int64"},
  };
  for (const auto& [dtype, name] : names) {
    EXPECT_EQ(to_string(dtype), name);
    EXPECT_EQ(parse_dtype(name), dtype);
  }
}

TEST(DTypeNames, OtherSpellings) {
  EXPECT_EQ(parse_dtype("float32"), DType::kF32);
  EXPECT_EQ(parse_dtype("float16"), DType::kF16);
  EXPECT_EQ(parse_dtype("half"), DType::kF16);
  EXPECT_EQ(parse_dtype("bfloat16"), DType::kBF16);
  EXPECT_EQ(parse_dtype("fp8"), DType::kE4M3);
  EXPECT_EQ(parse_dtype("e4m3"), DType::kE4M3);
  EXPECT_EQ(parse_dtype("e5m2"), DType::kE5M2);
}

TEST(DTypeNames, RefusesOthersAndListsTheKnown) {
  for (const char* name : {"", "fp4", "FP32", "bf16 ", "float"}) {
    try {
      parse_dtype(name);
      ADD_FAILURE() << name << " was parsed";
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(message.find("\"" + std::string(name) + "\""), std::string::npos) << message;
      EXPECT_NE(message.find("fp32, fp16, bf16, fp8_e4m3"), std::string::npos) << message;
    }
  }
}

TEST(DTypeNames, AValueOutsideTheEnumIsNoName) {
  const std::string name(to_string(static_cast<DType>(200)));
  EXPECT_THROW(parse_dtype(name), Error);
}

TEST(DeviceNames, TypeAndIndex) {
  EXPECT_EQ(to_string(Device{}), "cpu");
  EXPECT_EQ(to_string(Device{DeviceType::kCuda, 0}), "cuda:0");
  EXPECT_EQ(to_string(Device{DeviceType::kCuda, 7}), "cuda:7");
}

TEST(TensorViews, AreDenseAndCount) {
  std::int32_t data[24] = {};
  const TensorView view = view_of(data, {2, 3, 4});
  EXPECT_EQ(view.rank, 3);
  EXPECT_EQ(view.dtype, DType::kI32);
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(view.strides[0], 12);
  EXPECT_EQ(view.strides[1], 4);
  EXPECT_EQ(view.strides[2], 1);
  EXPECT_TRUE(view.given());
  EXPECT_FALSE(TensorView().given());
  EXPECT_EQ(TensorView().numel(), 0);
  const ConstTensorView read = view;
  EXPECT_EQ(read.data, data);
  EXPECT_EQ(read.strides, view.strides);
}

TEST(TensorViews, RefuseRanksOutOfRange) {
  EXPECT_THROW(TensorView(nullptr, DType::kF32, {}), Error);
  EXPECT_THROW(TensorView(nullptr, DType::kF32, {1, 1, 1, 1, 1}), Error);
}

}  // namespace
}  // namespace diffkv
