# What `cmake --install` writes: headers, library, command, and the package that
# find_package(diffkv) reads.
include(CMakePackageConfigHelpers)

install(TARGETS diffkv EXPORT diffkvTargets)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/diffkv DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.h")
if(TARGET diffkv_cli)
  install(TARGETS diffkv_cli)
endif()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/diffkv)
install(EXPORT diffkvTargets NAMESPACE diffkv:: DESTINATION ${package_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/diffkvConfig.cmake.in
  ${PROJECT_BINARY_DIR}/diffkvConfig.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may break its callers.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/diffkvConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/diffkvConfig.cmake
  ${PROJECT_BINARY_DIR}/diffkvConfigVersion.cmake DESTINATION ${package_dir})
