# Options of the build and what they mean for every target.
option(BUILD_SHARED_LIBS "Build diffkv as a shared library" ON)
option(DIFFKV_BUILD_TOOLS "Build the diffkv command and the libraries it needs" ON)
option(DIFFKV_BUILD_TESTS "Build the tests" ON)
option(DIFFKV_BUILD_FUZZERS "Build only the fuzz targets of the tests; needs clang" OFF)
option(DIFFKV_WERROR "Treat warnings as errors" OFF)
option(DIFFKV_SANITIZE "Build everything with AddressSanitizer and UBSan" OFF)
option(DIFFKV_COVERAGE "Build everything to measure line coverage" OFF)
option(DIFFKV_EMULATE_AMX "Multiply tiles by software where the CPU's matrix unit would, for tests" OFF)
option(DIFFKV_CCACHE "Compile through ccache where it is installed" ON)

# An interface of this build only: what it adds never reaches an installed target.
add_library(diffkv_warnings INTERFACE)
target_compile_options(diffkv_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow $<$<BOOL:${DIFFKV_WERROR}>:-Werror>>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wshadow
    $<$<BOOL:${DIFFKV_WERROR}>:-Werror=all-warnings>>)

if(DIFFKV_SANITIZE)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all
    -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
endif()
if(DIFFKV_BUILD_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "DIFFKV_BUILD_FUZZERS needs clang's libFuzzer; the compiler is "
      "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()
if(DIFFKV_COVERAGE)
  # Counters are shared by OpenMP threads.
  add_compile_options(--coverage -fprofile-update=atomic)
  add_link_options(--coverage)
endif()
if(DIFFKV_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(DIFFKV_CCACHE_PROGRAM ccache)
  if(DIFFKV_CCACHE_PROGRAM)
    set(CMAKE_CXX_COMPILER_LAUNCHER ${DIFFKV_CCACHE_PROGRAM})
  endif()
endif()
