# What `cmake --install` gives: headers, the library and a package for find_package(onepass).
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/onepass)
install(TARGETS onepass EXPORT onepassTargets)
install(DIRECTORY include/onepass DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT onepassTargets NAMESPACE onepass:: DESTINATION ${package_dir})
configure_package_config_file(cmake/onepassConfig.cmake.in ${PROJECT_BINARY_DIR}/onepassConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/onepassConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/onepassConfig.cmake ${PROJECT_BINARY_DIR}/onepassConfigVersion.cmake
  DESTINATION ${package_dir})
