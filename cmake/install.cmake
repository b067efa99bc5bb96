# cmake --install, and `cpack -G DEB` in the build folder.
include(GNUInstallDirs)
install(TARGETS internvld internvl RUNTIME)
install(TARGETS internvl_client ARCHIVE)
install(FILES client/internvl_client.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/internvl)
install(FILES proto/internvl/v1/internvl.proto DESTINATION ${CMAKE_INSTALL_DATADIR}/internvld/proto/internvl/v1)

# The client library is static and its messages come from libinternvld_proto, so both are installed.
install(TARGETS internvld_proto ARCHIVE)
configure_file(cmake/internvl.pc.in ${CMAKE_BINARY_DIR}/internvl.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/internvl.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(PROGRAMS deploy/launch.sh deploy/supervise.sh DESTINATION ${CMAKE_INSTALL_DATADIR}/internvld/deploy)
install(DIRECTORY deploy/layouts deploy/slurm DESTINATION ${CMAKE_INSTALL_DATADIR}/internvld/deploy)
install(FILES deploy/systemd/internvld.service DESTINATION lib/systemd/system)
install(FILES deploy/completion/internvl.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions
  RENAME internvl)
install(FILES deploy/completion/internvl.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions
  RENAME internvld)

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME internvld)
set(CPACK_PACKAGE_CONTACT "internvld authors")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "distributed inference daemon for the InternVL3 vision-language family")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "openmpi-bin, procps")
set(CPACK_DEBIAN_PACKAGE_SECTION science)
include(CPack)
