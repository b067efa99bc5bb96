# cmake --install, and `cpack -G DEB` in the build folder.
include(GNUInstallDirs)
install(TARGETS internvld internvl RUNTIME)
install(TARGETS internvl_client ARCHIVE)
install(FILES client/internvl_client.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/internvl)
install(FILES proto/internvl/v1/internvl.proto DESTINATION ${CMAKE_INSTALL_DATADIR}/internvld/proto/internvl/v1)

# The client library is static and its messages come from libinternvld_proto, so both are installed.
install(TARGETS internvld_proto ARCHIVE)
# Where it is installed says where the rest is: `cmake --install --prefix` and packages choose that later.
file(RELATIVE_PATH INTERNVL_PC_TO_PREFIX "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
configure_file(cmake/internvl.pc.in ${CMAKE_BINARY_DIR}/internvl.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/internvl.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(PROGRAMS deploy/launch.sh deploy/supervise.sh DESTINATION ${CMAKE_INSTALL_DATADIR}/internvld/deploy)
install(DIRECTORY deploy/layouts deploy/slurm DESTINATION ${CMAKE_INSTALL_DATADIR}/internvld/deploy)
install(FILES deploy/systemd/internvld.service DESTINATION lib/systemd/system)
install(FILES deploy/completion/internvl.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions
  RENAME internvl)
install(FILES deploy/completion/internvl.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions
  RENAME internvld)

# /etc beside /usr, in a package's folder as on a machine; below any other prefix.
install(CODE "
  set(etc \"\${CMAKE_INSTALL_PREFIX}/etc\")
  if(\"\${CMAKE_INSTALL_PREFIX}\" MATCHES \"^(.*)/usr$\")
    set(etc \"\${CMAKE_MATCH_1}/etc\")
  endif()
  file(INSTALL DESTINATION \"\${etc}/default\" TYPE FILE RENAME internvld
    FILES \"${CMAKE_SOURCE_DIR}/deploy/systemd/internvld.default\")")

# The pages' options are what --help says. Plug-ins of MPI that a sanitizer sees as leaks are no matter here.
foreach(program internvld internvl)
  set(page ${CMAKE_BINARY_DIR}/man/${program}.1)
  add_custom_command(OUTPUT ${page} VERBATIM
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/man
    COMMAND ${CMAKE_COMMAND} -E env ASAN_OPTIONS=detect_leaks=0 sh ${CMAKE_SOURCE_DIR}/deploy/man/pages.sh ${program}
      ${CMAKE_SOURCE_DIR}/deploy/man/${program}.1.in $<TARGET_FILE:${program}> ${PROJECT_VERSION} > ${page}
    DEPENDS ${program} deploy/man/pages.sh deploy/man/${program}.1.in
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  list(APPEND pages ${page})
endforeach()
add_custom_target(manual ALL DEPENDS ${pages})
install(FILES ${pages} DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME internvld)
set(CPACK_PACKAGE_CONTACT "internvld authors")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "distributed inference daemon for the InternVL3 vision-language family")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "openmpi-bin")
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "libgrpc-dev, libprotobuf-c-dev, pkg-config, slurm-client") # programs in C; deploy/slurm
set(CPACK_DEBIAN_PACKAGE_SECTION science)
file(WRITE ${CMAKE_BINARY_DIR}/package/conffiles "/etc/default/internvld\n")
set(CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA ${CMAKE_BINARY_DIR}/package/conffiles)
include(CPack)
