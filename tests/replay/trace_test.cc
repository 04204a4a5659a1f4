#include "replay/trace.h"

#include <gtest/gtest.h>

#include <sstream>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

const std::string kHeader = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

std::vector<TraceRequest> read(const std::string& text) {
  std::istringstream in(text);
  return read_trace(in, "t.csv");
}

std::string message_of(const std::string& text) {
  try {
    read(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    return error.what();
  }
  return "no error";
}

TEST(Trace, ReadsDatesAndTokens) {
  const auto requests =
      read(kHeader + "2023-12-31 23:59:59.5000000,4808,10\n2024-01-01 00:00:01.7500000,7,1\n");
  ASSERT_EQ(requests.size(), 2U);
  EXPECT_EQ(requests[0].arrival_s, 0.0);
  EXPECT_EQ(requests[0].prompt_tokens, 4808);
  EXPECT_EQ(requests[0].generated_tokens, 10);
  EXPECT_DOUBLE_EQ(requests[1].arrival_s, 2.25);
  EXPECT_EQ(requests[1].prompt_tokens, 7);
  EXPECT_EQ(requests[1].generated_tokens, 1);
}

TEST(Trace, KeepsFractionsFarFromTheEpoch) {
  const auto requests = read(kHeader +
                             "2023-11-16 18:17:03.9799600,1,1\n"
                             "2023-11-16 18:17:04.0319601,1,1\n");
  EXPECT_NEAR(requests[1].arrival_s, 0.0520001, 1e-12);
}

TEST(Trace, TakesEveryFormOfTheSameFile) {
  const std::string rows = "3.5,10,2\n4,20,1\n";
  const std::vector<std::string> forms = {
      kHeader + rows,
      "\xEF\xBB\xBF" + kHeader + rows,
      "TIMESTAMP,ContextTokens,GeneratedTokens\r\n3.5,10,2\r\n4,20,1\r\n",
      "TIMESTAMP,ContextTokens,GeneratedTokens\n3.5,10,2\n4,20,1",  // no end of line
      "GeneratedTokens,x,TIMESTAMP,ContextTokens\n2,,3.5,10\n1,abc,4,20\n",
      "\"TIMESTAMP\",\"ContextTokens\",\"GeneratedTokens\",\"a \"\"b\"\", c\"\n"
      "\"3.5\",\"10\",\"2\",\"x, y\"\n4 , \"20\" , 1,\"\"\n",
      "\n" + kHeader + "\n3.5, 10,\t2\n\n4,20,1\n\n",
      kHeader + "4,20,1\n3.5,10,2\n",  // out of order
  };
  for (const std::string& form : forms) {
    const auto requests = read(form);
    ASSERT_EQ(requests.size(), 2U) << form;
    EXPECT_EQ(requests[0].prompt_tokens, 10) << form;
    EXPECT_EQ(requests[0].generated_tokens, 2) << form;
    EXPECT_EQ(requests[1].prompt_tokens, 20) << form;
    EXPECT_EQ(requests[1].generated_tokens, 1) << form;
    EXPECT_EQ(requests[1].arrival_s, 0.5) << form;
  }
}

TEST(Trace, EqualTimesKeepTheFilesOrder) {
  const auto requests = read(kHeader + "2,1,1\n1,2,1\n1,3,1\n1,4,1\n");
  EXPECT_EQ(requests[0].prompt_tokens, 2);
  EXPECT_EQ(requests[1].prompt_tokens, 3);
  EXPECT_EQ(requests[2].prompt_tokens, 4);
  EXPECT_EQ(requests[3].prompt_tokens, 1);
}

TEST(Trace, NamesWhatIsMalformed) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "t.csv: the trace is empty (no header), expected a header and at least one row"},
      {"\n\n", "t.csv: the trace is empty (no header), expected a header and at least one row"},
      {kHeader,
       "t.csv: the trace is empty (a header without rows), expected a header and at least one row"},
      {"TIMESTAMP,ContextTokens\n1,2\n",
       "t.csv:1: the header has column GeneratedTokens 0 times, expected once; it has "
       "\"TIMESTAMP\", \"ContextTokens\""},
      {"TIMESTAMP,ContextTokens,GeneratedTokens,TIMESTAMP\n",
       "t.csv:1: the header has column TIMESTAMP 2 times, expected once; it has \"TIMESTAMP\", "
       "\"ContextTokens\", \"GeneratedTokens\", \"TIMESTAMP\""},
      {kHeader + "1,2\n", "t.csv:2: the row has 2 fields, expected 3 as in the header"},
      {kHeader + "1,2,3,4\n", "t.csv:2: the row has 4 fields, expected 3 as in the header"},
      {kHeader + "1,1,1\n1,0,3\n",
       "t.csv:3: ContextTokens is \"0\", expected 1 to 16777216 tokens"},
      {kHeader + "1,5,-3\n", "t.csv:2: GeneratedTokens is \"-3\", expected 1 to 16777216 tokens"},
      {kHeader + "1,16777217,3\n",
       "t.csv:2: ContextTokens is \"16777217\", expected 1 to 16777216 tokens"},
      {kHeader + "1,99999999999999999999,3\n",
       "t.csv:2: ContextTokens is \"99999999999999999999\", expected 1 to 16777216 tokens"},
      {kHeader + "1,1e3,3\n", "t.csv:2: ContextTokens is \"1e3\", expected a whole number"},
      {kHeader + "1,,3\n", "t.csv:2: ContextTokens is \"\", expected a whole number"},
      {kHeader + "1,2,3.5\n", "t.csv:2: GeneratedTokens is \"3.5\", expected a whole number"},
      {kHeader + "1,2,\x01\n", "t.csv:2: GeneratedTokens is \"\\x01\", expected a whole number"},
      {kHeader + "noon,2,3\n",
       "t.csv:2: TIMESTAMP is \"noon\", expected \"YYYY-MM-DD HH:MM:SS[.fraction]\" or seconds (at "
       "most 1e12)"},
      {kHeader + "\"1,2,3\n", "t.csv:2: field 1 has an opening quote without a closing one"},
      {kHeader + "1,\"2\"x,3\n", "t.csv:2: field 2 goes on after its closing quote with \"x\""},
      {kHeader + "1,2,3\n2023-11-16 18:17:03,2,3\n",
       "t.csv:3: TIMESTAMP is \"2023-11-16 18:17:03\", expected the first row's kind of time (a "
       "date in every row, or seconds in every row)"},
  };
  for (const auto& [text, message] : cases) EXPECT_EQ(message_of(text), message) << text;
}

TEST(Trace, RefusesTimesThatAreNone) {
  for (const char* time :
       {"2023-02-29 00:00:00", "2023-13-01 00:00:00", "2023-01-01 24:00:00", "2023-01-01 00:60:00",
        "2023-01-01 00:00:61", "2023-01-01", "2023-01-01 00:00:00.", "2023-01-01 00:00:00.1x",
        "2023/01/01 00:00:00", "nan", "inf", "1e13", "-1e13", "", "1 2"}) {
    EXPECT_NE(message_of(kHeader + time + ",1,1\n").find("t.csv:2: TIMESTAMP is \""),
              std::string::npos)
        << time;
  }
  for (const char* time : {"2024-02-29T00:00:00Z", "2023-01-01 00:00:60", "-5.25", "1e3"}) {
    EXPECT_EQ(read(kHeader + time + ",1,1\n").size(), 1U) << time;
  }
}

TEST(Trace, RefusesEndlessLines) {
  EXPECT_EQ(message_of(kHeader + std::string(kMaxLineBytes + 1, 'x')),
            "t.csv:2: the line is longer than 65536 bytes");
}

TEST(Trace, FilesThatCannotBeRead) {
  EXPECT_THROW(read_trace_file("/nonexistent/trace.csv"), Error);
  EXPECT_THROW(read_trace_file("/"), Error);
}

TEST(Trace, TheSampleHasItsRequests) {
  const auto requests = read_trace_file(SAMPLE_TRACE);
  EXPECT_EQ(requests.size(), 240U);
  EXPECT_EQ(requests.front().prompt_tokens, 118);
  EXPECT_EQ(requests.front().generated_tokens, 53);
  EXPECT_NEAR(requests.back().arrival_s, 113.847, 1e-9);
}

}  // namespace
}  // namespace diffkv::replay
