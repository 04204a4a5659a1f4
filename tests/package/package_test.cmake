# Installs BUILD_DIR under WORK_DIR, moves the prefix, builds the consumer in SOURCE_DIR against it
# and runs it; it must print VERSION.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${WORK_DIR})
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${WORK_DIR}/installed)
# A package that still works after a move names nothing by an absolute path.
file(RENAME ${WORK_DIR}/installed ${WORK_DIR}/prefix)
run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE_DIR} -B ${WORK_DIR}/build
  -D CMAKE_CXX_COMPILER=${COMPILER} -D CMAKE_PREFIX_PATH=${WORK_DIR}/prefix
  -D DIFFKV_VERSION=${VERSION})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)
execute_process(COMMAND ${WORK_DIR}/build/consumer OUTPUT_VARIABLE printed
  COMMAND_ERROR_IS_FATAL ANY)
if(NOT printed STREQUAL "diffkv ${VERSION}: 0.5\n")
  message(FATAL_ERROR "the consumer printed '${printed}', expected 'diffkv ${VERSION}: 0.5'")
endif()
if(EXISTS ${WORK_DIR}/prefix/bin/diffkv)
  run(${WORK_DIR}/prefix/bin/diffkv --version)
endif()
