# diffkv_test(<name> SOURCES <file>... [LIBS <target>...] [LABELS <label>...] [TIMEOUT <seconds>]
#             [WHOLE])
#
# A GoogleTest program with its own main, linked with diffkv; internal headers are included as
# "core/mask.h". Every TEST is a test of ctest; with WHOLE the program is one (for programs with
# thousands of small cases). A GTEST_SKIP is a skip of ctest. The default TIMEOUT is 300 seconds.
include(GoogleTest)

function(diffkv_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "WHOLE" "TIMEOUT" "SOURCES;LIBS;LABELS")
  if(NOT arg_SOURCES)
    message(FATAL_ERROR "diffkv_test(${name}): SOURCES is missing")
  endif()
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "diffkv_test(${name}): unknown arguments: ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()

  add_executable(${name} ${arg_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(${name} PRIVATE diffkv diffkv_warnings ${arg_LIBS} GTest::gtest_main)

  set(properties TIMEOUT ${arg_TIMEOUT})
  if(arg_LABELS)
    list(APPEND properties LABELS "${arg_LABELS}")
  endif()
  if(arg_WHOLE)
    add_test(NAME ${name} COMMAND ${name})
    # A skip is a program that ran nothing: no test passed, and skipped ones, not failed ones, end
    # its output.
    set(skipped_line "\\[  SKIPPED \\] [^\n]*\n")
    set_tests_properties(${name} PROPERTIES ${properties}
      SKIP_REGULAR_EXPRESSION "\\[  PASSED  \\] 0 tests\\.\n(${skipped_line})+$")
  else()
    # Discovered when ctest starts, so that a build does not run what it builds.
    gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60 NO_PRETTY_VALUES
      TEST_PREFIX "${name}." PROPERTIES ${properties})
  endif()
endfunction()
