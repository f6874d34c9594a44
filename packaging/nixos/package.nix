# The static program, from this very folder. Rust's glibc target links statically against glibc's static libraries.
{ lib, rustPlatform, glibc, installShellFiles }:
rustPlatform.buildRustPackage {
  pname = "stiefel";
  version = "0.1.0";
  src = lib.cleanSource ../..;
  cargoLock.lockFile = ../../Cargo.lock;
  cargoBuildFlags = [ "-p" "stiefel" ];
  # What .cargo/config.toml says, which nixpkgs' own flags take the place of.
  RUSTFLAGS = ''-C target-feature=+crt-static --cfg getrandom_backend="linux_getrandom"'';
  buildInputs = [ glibc.static ];
  nativeBuildInputs = [ installShellFiles ];
  # They want virtual machines, block devices and root.
  doCheck = false;
  postInstall = ''
    mkdir man
    $out/bin/stiefel generate man --dir man
    installManPage man/*.1
    installShellCompletion --cmd stiefel \
      --bash <($out/bin/stiefel generate bash) \
      --zsh <($out/bin/stiefel generate zsh) \
      --fish <($out/bin/stiefel generate fish)
  '';
  meta = {
    description = "Boot a desktop PC from a laptop's own disk over a cable";
    license = lib.licenses.gpl3Plus;
    mainProgram = "stiefel";
    platforms = lib.platforms.linux;
  };
}
