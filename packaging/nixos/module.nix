# stiefel on NixOS: takes the place of `stiefel install`, which would change files that NixOS makes.
#
#   imports = [ ./stiefel/packaging/nixos/module.nix ];
#   services.stiefel = { enable = true; settings.trigger.macs = [ "00:e0:4c:68:01:02" ]; };
#
# The program (services.stiefel.package) must be static: ./package.nix builds it. Keys are made by hand, once, and are never in
# the store, which everyone can read: stiefel key new stick.
{ config, lib, pkgs, ... }:
let
  cfg = config.services.stiefel;
  trigger = cfg.settings.trigger or { };
  macs = trigger.macs or [ ];
  usb = map (lib.splitString ":") (trigger.usb or [ ]);
  vendor = id: builtins.elemAt id 0;
  product = id: builtins.elemAt id 1;
  kernel = config.boot.kernelPackages.kernel;
  modules = "/run/current-system/kernel-modules/lib/modules";
  # JSON is YAML.
  settings = pkgs.writeText "stiefel-config.yaml" (builtins.toJSON cfg.settings);
in
{
  options.services.stiefel = {
    enable = lib.mkEnableOption "serving this laptop's disk to a desktop when its network adapter is plugged in";
    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.callPackage ./package.nix { };
      description = "The static program.";
    };
    settings = lib.mkOption {
      type = lib.types.attrs;
      default = { };
      description = "What config-example.yaml explains, as attributes.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        # The stub's place is not known to the program here, and the service cannot write to the EFI system partition.
        assertion = (trigger.method or "kexec") == "kexec";
        message = "services.stiefel: trigger.method: reboot does not work on NixOS; leave it out (kexec)";
      }
    ];

    environment.systemPackages = [ cfg.package ];
    environment.etc."stiefel/config.yaml".source = settings;
    systemd.tmpfiles.rules = [
      "d /etc/stiefel/keys 0700 root root -"
      "d /var/lib/stiefel 0755 root root -"
    ];


    # A passphrase may be asked on the desktop. (An initrd that is built there is no danger: NixOS makes its initrds from such lists,
    # and not from the hardware it runs on.)
    boot.initrd.availableKernelModules = [ "xhci_pci" "usbhid" "hid_generic" ];

    # The ramdisk is built anew when kernel, program or configuration changed, and the old one stays if that fails.
    systemd.services.stiefel-ramdisk = {
      description = "stiefel: the ramdisk for this generation's kernel";
      wantedBy = [ "multi-user.target" ];
      restartTriggers = [ cfg.package kernel settings ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
      };
      script = ''
        exec ${cfg.package}/bin/stiefel build --if-changed \
          --kernel ${config.system.build.kernel}/${config.system.boot.loader.kernelFile} \
          --modules ${modules}/${kernel.modDirVersion} \
          --firmware /run/current-system/firmware
      '';
    };

    systemd.services.stiefel-autokexec = {
      description = "stiefel: serve this laptop's disk when its network adapter is plugged in";
      wantedBy = [ "multi-user.target" ];
      after = [ "local-fs.target" "systemd-udevd.service" "stiefel-ramdisk.service" ];
      restartTriggers = [ cfg.package settings ];
      unitConfig = {
        ConditionKernelCommandLine = "!rdinit=/stiefel/stiefel";
        StartLimitIntervalSec = "2min";
        StartLimitBurst = 5;
      };
      path = [ config.systemd.package ];
      # As in hooks/systemd/stiefel-autokexec.service, which says why.
      serviceConfig = {
        ExecStart = "${cfg.package}/bin/stiefel autokexec";
        Restart = "on-failure";
        RestartSec = "5s";
        RestartPreventExitStatus = 2;
        UMask = "0077";
        RuntimeDirectory = "stiefel-autokexec";
        CapabilityBoundingSet = "CAP_SYS_BOOT CAP_NET_ADMIN CAP_NET_RAW CAP_SYS_ADMIN";
        NoNewPrivileges = true;
        ProtectSystem = "strict";
        ProtectHome = true;
        PrivateTmp = true;
        DevicePolicy = "closed";
        DeviceAllow = "block-* r";
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelTunables = true;
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        RestrictAddressFamilies = "AF_UNIX AF_NETLINK AF_INET6";
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallFilter = "@system-service kexec_file_load";
        SystemCallErrorNumber = "EPERM";
      };
    };

    # Says in each graphical session when the laptop is about to leave; as hooks/xdg/stiefel-notify.desktop.
    environment.etc."xdg/autostart/stiefel-notify.desktop".text = ''
      [Desktop Entry]
      Type=Application
      Name=stiefel
      Exec=${cfg.package}/bin/stiefel notify
      Icon=computer-laptop
      Terminal=false
      NoDisplay=true
    '';

    # Network managers leave the dedicated NIC alone.
    networking.networkmanager.unmanaged = map (mac: "mac:${mac}") macs;
    systemd.network.networks = lib.listToAttrs (
      map (mac: lib.nameValuePair "05-stiefel-${lib.replaceStrings [ ":" ] [ "" ] mac}" {
        matchConfig.MACAddress = mac;
        linkConfig = { Unmanaged = true; RequiredForOnline = false; };
      }) macs
      ++ map (id: lib.nameValuePair "05-stiefel-${vendor id}-${product id}" {
        matchConfig.Property = [ "ID_VENDOR_ID=${vendor id}" "ID_MODEL_ID=${product id}" ];
        linkConfig = { Unmanaged = true; RequiredForOnline = false; };
      }) usb
    );
    services.udev.extraRules = lib.concatMapStrings (id: ''
      ACTION!="remove", SUBSYSTEM=="net", SUBSYSTEMS=="usb", ATTRS{idVendor}=="${vendor id}", ATTRS{idProduct}=="${product id}", ENV{NM_UNMANAGED}="1"
    '') usb;
  };
}
